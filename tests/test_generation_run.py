"""`kd generate` against an endpoint of our own that limits, fails, hangs and sends nonsense.

Run: pytest tests/test_generation_run.py
"""

import asyncio
import json
import sys

import pytest
import yaml
from conftest import tiny_tokenizer
from made_generations import KEY, LIMITS, asked, dollars, rows_in

from kdlib.config.data import DataConfig
from kdlib.config.run import parse
from kdlib.data.qa import prepare
from kdlib.errors import RunError, Stopped, TeacherError
from kdlib.generation import run as generation
from kdlib.generation.config import GenerationConfig
from kdlib.runs.folder import Run
from kdlib.workbench import cli

MODES = (
    "429x2",
    "500x1",
    "529x1",
    "hangx1",
    "halfx1",
    "nousage",
    "500",
    "529",
    "hang",
    "half",
    "json",
    "shape",
)
MODES += ("empty", "cut", "refusal")


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_every_prompt_ends_as_kept_rejected_or_failed_and_none_is_paid_twice(generations, endpoint, provider):
    texts = [f"[{mode}] number {n}" for n, mode in enumerate(MODES)] + [f"plain {n}" for n in range(5)]
    config = generations.config([*texts, "plain 0"], provider)
    run = generations.run(config)
    counts = asked(run, config)
    rows = {
        name: {row["prompt"]: row for row in rows_in(run, name)} for name in ("kept", "rejected", "failed")
    }
    assert counts == {"kept": 11, "rejected": 4, "failed": 6, "unasked": 0}
    assert set().union(*rows.values()) == set(texts)
    reasons = [row["reason"] for row in rows_in(run, "rejected")]
    assert reasons == ["empty", "cut off", "refusal", f"repeated prompt: number {len(MODES)}"]
    whys = {
        mode: rows["failed"][text]["reason"]
        for mode, text in zip(MODES, texts, strict=False)
        if text in rows["failed"]
    }
    assert whys.keys() == {"500", "529", "hang", "half", "json", "shape"}
    assert "status 500" in whys["500"]
    assert "status 529" in whys["529"]
    assert "timed out" in whys["hang"]
    assert "is no JSON" in whys["json"]
    assert "cannot be read" in whys["shape"]
    assert max(endpoint.paid.values()) == 1
    assert endpoint.most_under_way <= config.limits.at_once
    paid = {
        mode for mode, text in zip(MODES, texts, strict=False) if rows["failed"].get(text, {}).get("cost")
    }
    assert paid == {"hang", "half", "json", "shape"}
    assert Run(run.path).status["state"] == "done"


def test_what_failed_for_nothing_is_asked_again_and_what_may_have_been_paid_only_if_wished(
    generations, endpoint
):
    config = generations.config(["[500] a", "[json] b", "plain"])
    run = generations.run(config)
    asked(run, config)
    before = dict(endpoint.tries)
    asked(run, config)
    assert endpoint.tries["[500] a"] == 2 * before["[500] a"]
    assert endpoint.tries["[json] b"] == endpoint.tries["plain"] == 1
    asked(run, config, again=True)
    assert endpoint.tries["[json] b"] == 2
    assert endpoint.tries["plain"] == 1
    spent = json.loads((run.path / "progress.json").read_text())["spent_usd"]
    assert spent == pytest.approx(dollars(endpoint) + 2 * rows_in(run, "failed")[1]["cost"])


def test_the_budget_is_never_passed_and_used_up_to_one_request(generations, endpoint):
    texts = [f"{mode} number {n}" for n, mode in enumerate(["plain", "[halfx1]", "plain", "[nousage]"] * 15)]
    config = generations.config(texts, budget={"usd": 0.03}, limits={**LIMITS, "at_once": 4})
    run = generations.run(config)
    with pytest.raises(Stopped, match=r"the budget of \$0.03 has no room for another request"):
        asked(run, config)
    spent = json.loads((run.path / "progress.json").read_text())["spent_usd"]
    largest = (200 * 15 + 150 * 3) / 1e6
    assert 0.03 - 2 * largest < spent <= 0.03
    assert dollars(endpoint) <= spent
    once = dict(endpoint.paid)
    larger = parse({**config.as_dict(), "budget": {"usd": 5}}, kind=GenerationConfig)
    asked(generation.reopened(generations.root, "made", larger), larger)
    assert len(rows_in(run, "kept")) == 60
    assert all(endpoint.paid[text] == times for text, times in once.items())
    assert Run(run.path).manifest["changed"][0]["settings"] == ["budget.usd: 0.03 -> 5.0"]


def test_costs_are_known_to_the_cent(generations, endpoint):
    config = generations.config([f"plain {n}" for n in range(12)])
    run = generations.run(config)
    asked(run, config)
    rows = rows_in(run, "kept")
    by_hand = sum((row["usage"]["input"] * 3 + row["usage"]["output"] * 15) / 1e6 for row in rows)
    assert sum(row["cost"] for row in rows) == pytest.approx(by_hand, abs=1e-9)
    assert dollars(endpoint) == pytest.approx(by_hand, abs=1e-9)


def test_no_key_is_anywhere_on_disk(generations, endpoint, tmp_path):
    config = generations.config([f"say {KEY} please", "[500] x", "plain"])
    run = generations.run(config)
    asked(run, config)
    assert endpoint.keys == {f"Bearer {KEY}"}
    assert not [
        file
        for file in tmp_path.rglob("*")
        if file.is_file() and file.name != "prompts.jsonl" and KEY in file.read_text()
    ]
    assert KEY not in (run.path / "prompts.jsonl").read_text()
    assert "say $MADE_API_KEY please" in {row["prompt"] for row in rows_in(run, "kept")}


def test_a_key_goes_to_no_other_address(generations, endpoint, monkeypatch):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, f"planted-{name}")
    for provider in ("openai", "anthropic"):
        named = generations.config(["plain"], provider).as_dict()
        named["teacher"]["endpoint"]["key_variable"] = None
        config = parse(named, kind=GenerationConfig)
        generation.check(config)
        asked(generations.run(config, provider), config)
    assert endpoint.keys <= {"Bearer none", "none"}


def test_an_answer_with_half_a_character_is_kept(generations, endpoint, monkeypatch):
    monkeypatch.setattr(endpoint, "said", lambda prompt, mode: "a \ud83d b")
    config = generations.config(["plain"])
    run = generations.run(config)
    asked(run, config)
    assert rows_in(run, "kept")[0]["response"] == "a ? b"


def test_a_disk_that_refuses_ends_the_run_in_words(generations, monkeypatch):
    config = generations.config([f"plain {n}" for n in range(20)])
    run = generations.run(config)

    def full(file, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kdlib.runs.files.os.write", full)
    with pytest.raises(RunError, match="cannot write"):
        asked(run, config)


def test_a_notebooks_own_loop_does_not_matter(generations):
    config = generations.config(["plain"])
    run = generations.run(config)

    async def cell():
        generation.check(config)
        return asked(run, config)

    assert asyncio.run(cell())["kept"] == 1


def test_requests_and_tokens_a_minute_are_held(generations, endpoint):
    config = generations.config([f"plain {n}" for n in range(6)], limits={"requests_per_minute": 300})
    asked(generations.run(config, "requests"), config)
    assert max(endpoint.times) - min(endpoint.times) > 0.5  # 5 × 0.2 s
    endpoint.times.clear()
    limits = {"tokens_per_minute": 60_000, "at_once": 8}
    config = generations.config([f"other {n}" for n in range(6)], limits=limits)
    asked(generations.run(config, "tokens"), config)
    assert max(endpoint.times) - min(endpoint.times) > 0.5  # 5 × some 210 tokens at 1000 a second


def test_a_pause_that_the_endpoint_asks_for_is_heeded_by_all(generations, endpoint):
    endpoint.seconds = 0.02
    config = generations.config(
        ["[pausex4]", *(f"plain {n}" for n in range(20))], limits={**LIMITS, "at_once": 2}
    )
    asked(generations.run(config), config)
    times = sorted(endpoint.times)
    assert max(later - sooner for sooner, later in zip(times, times[1:], strict=False)) > 0.2
    assert sum(endpoint.paid.values()) == 21


def test_rows_are_read_by_a_training_as_they_are(generations, tmp_path):
    config = generations.config([f"plain {n}" for n in range(20)])
    run = generations.run(config)
    asked(run, config)
    rows = rows_in(run, "kept")
    assert list(rows[0])[:2] == ["prompt", "category"]
    tokenizer = tiny_tokenizer([row["response"] for row in rows])
    data = DataConfig(source=str(run.path / "kept.jsonl"), group="seed", max_length=2000)
    prepared = prepare(data, tokenizer, seed=0)
    assert prepared.notes["form"] == "prompt and response"
    assert prepared.notes["train_rows"] + prepared.notes["validation_rows"] == 20


def test_conversations_are_read_by_a_training_too(generations, tmp_path):
    config = generations.config(["unused"])
    talk = [{"role": "system", "content": "be short"}, {"role": "user", "content": "u"}]
    path = tmp_path / "prompts.jsonl"
    lines = [{"messages": [talk[0], {"role": "user", "content": f"u{n}"}], "category": "a"} for n in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"prompt": "p", "category": "b"}]))
    run = generations.run(config)
    asked(run, config)
    tokenizer = tiny_tokenizer(["some text"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    data = DataConfig(source=str(run.path / "kept.jsonl"), max_length=2000)
    assert prepare(data, tokenizer, seed=0).notes["form"] == "messages"


def test_an_endpoint_that_goes_away_stops_the_run_and_loses_nothing(generations, endpoint):
    config = generations.config(
        [f"plain {n}" for n in range(5)] + [f"[500] {n}" for n in range(60)],
        limits={**LIMITS, "retries": 0, "at_once": 2},
    )
    run = generations.run(config)
    with pytest.raises(TeacherError, match="12 prompts in a row had no answer, the last: status 500"):
        asked(run, config)
    assert len(rows_in(run, "kept")) == 5
    assert sum(endpoint.tries.values()) <= 5 + 14
    assert Run(run.path).status["state"] == "failed"


def test_an_address_that_cannot_list_its_models_is_asked_all_the_same(generations, endpoint, monkeypatch):
    config = generations.config(["plain"])
    folder = parse(config.as_dict(), ["teacher.endpoint.model=/models/mine"], kind=GenerationConfig)
    generation.check(folder)
    monkeypatch.setattr(endpoint, "models", lambda request: endpoint.send(request, 500, {"error": {}}))
    generation.check(config)


def test_a_run_goes_on_only_with_what_it_asked(generations):
    config = generations.config(["plain"])
    generations.run(config)
    other = parse({**config.as_dict(), "sampling": {"max_tokens": 100}}, kind=GenerationConfig)
    with pytest.raises(RunError, match=r"sampling.max_tokens: 200 -> 100"):
        generation.reopened(generations.root, "made", other)


def test_a_torn_last_line_is_cut_and_a_broken_one_is_named(generations, endpoint, capsys):
    config = generations.config(["plain 1", "plain 2"])
    run = generations.run(config)
    asked(run, config)
    whole = (run.path / "kept.jsonl").read_bytes()
    log = run.path / "answers.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    asked(run, config)
    assert "a last line that was torn by a kill is cut" in capsys.readouterr().out
    assert (run.path / "kept.jsonl").read_bytes() == whole
    assert sorted(endpoint.paid.values()) == [1, 2]
    log.write_bytes(b"{broken\n" + log.read_bytes())
    with pytest.raises(RunError, match="line 1: found no JSON"):
        asked(run, config)


@pytest.fixture
def kd(tmp_path, generations, monkeypatch, capsys):
    def call(config, *words, environment=None):
        path = tmp_path / "some.yaml"
        path.write_text(yaml.safe_dump(config.as_dict()))
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        folders = ["--runs", str(generations.root), "--reports", str(tmp_path / "reports")]
        monkeypatch.setattr(sys, "argv", ["kd", "generate", str(path), *folders, *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return caught.value.code or 0, said.out + said.err

    return call


@pytest.mark.parametrize(
    ("override", "environment", "expected"),
    [
        ("teacher.endpoint.model=tiny-teachr", {}, "no model 'tiny-teachr'; did you mean 'tiny-teacher'?"),
        ("teacher.endpoint.key_variable=OTHER_KEY", {}, "no key: the environment has no OTHER_KEY"),
        ("seed=0", {"MADE_API_KEY": "wrong-key-0123456789"}, "look at the key in $MADE_API_KEY"),
        ("teacher.endpoint.base_url=http://127.0.0.1:9/v1", {}, "is it running there?"),
        ("budget.usd=0", {}, "found 0: nothing can be asked for it"),
        ("prices=null", {}, "no price is known for tiny-teacher"),
        ("prompts.from=missing.jsonl", {}, "missing.jsonl: no such file"),
        ("prompts.form=x", {}, "did you mean 'from'?"),
    ],
)
def test_bad_input_is_a_clear_message_before_anything_is_paid(
    kd, generations, endpoint, override, environment, expected
):
    config = generations.config(["plain"], budget={"usd": 1})
    status, said = kd(config, "-o", override, environment=environment)
    assert (status, endpoint.tries) == (1, {})
    assert expected in said
    assert "Traceback" not in said
    assert "wrong-key-0123456789" not in said
    assert not generations.root.exists()


def test_the_command_asks_goes_on_and_forecasts(kd, generations, endpoint, tmp_path):
    config = generations.config([f"plain {n}" for n in range(3)])
    status, said = kd(config, "--dry-run")
    assert (status, endpoint.tries) == (0, {})
    assert "tiny-teacher (this config)" in said
    assert "claude-sonnet-5-5" in said
    status, said = kd(config, "--name", "one")
    assert status == 0
    assert "3 kept; $0.0" in said
    assert "report: " in said
    assert (tmp_path / "reports" / "one" / "report.html").exists()
    assert kd(config, "--resume", "one", "--again")[0] == 0
    assert max(endpoint.tries.values()) == 1
    assert "--again goes with --resume" in kd(config, "--again")[1]
    progress = json.loads((generations.root / "one" / "progress.json").read_text())
    assert (progress["answered"], progress["kept"], progress["under_way"]) == (3, 3, 0)


def test_prompts_are_made_of_seeds_and_evolved_by_the_teacher(generations, endpoint, monkeypatch):
    harder = "write a function that does the same for nested lists, number "
    is_asked = "difficulty"
    said = endpoint.said
    monkeypatch.setattr(
        endpoint,
        "said",
        lambda prompt, mode: f"{harder}{len(prompt)}" if is_asked in prompt else said(prompt, mode),
    )
    config = generations.config(["unused"], prompts={"seeds": "stdlib", "count": 8, "evolve": 1})
    run = generations.run(config)
    counts = asked(run, config)
    rows = rows_in(run, "kept") + rows_in(run, "rejected") + rows_in(run, "failed")
    assert counts["unasked"] == 0
    assert sum("+evolved" in row["template"] for row in rows) >= 7
    assert len({row["category"] for row in rows}) == 8
    tries = sum(endpoint.tries.values())
    assert tries == 8 + len(rows) - sum("repeated" in row.get("reason", "") for row in rows)
    asked(run, config)
    assert sum(endpoint.tries.values()) == tries


def test_a_judge_is_asked_about_what_the_filters_keep_and_within_the_budget(
    generations, endpoint, monkeypatch
):
    said = endpoint.said

    def judged(prompt, mode):
        if "impartial judge" not in prompt:
            return said(prompt, mode)
        return "well [[9]]" if "plain 1" in prompt else "bad [[2]]" if "plain 2" in prompt else "no number"

    monkeypatch.setattr(endpoint, "said", judged)
    judge = {"teacher": generations.config([]).as_dict()["teacher"], "prices": {"input": 1, "output": 1}}
    judge["teacher"]["endpoint"]["model"] = "gpt-4.1"
    config = generations.config(
        ["plain 1", "plain 2", "plain 3", "[empty] 4"], judge=judge, budget={"usd": 1}
    )
    run = generations.run(config)
    assert asked(run, config)["kept"] == 1
    reasons = [row["reason"] for row in rows_in(run, "rejected")]
    assert reasons == ["low score: 2 of 10", "low score: the judge gave none", "empty"]
    assert sum("impartial judge" in prompt for prompt in endpoint.paid) == 3
    asked(run, config)
    assert max(endpoint.paid.values()) == 1
    costs = sum(row["cost"] for name in ("kept", "rejected") for row in rows_in(run, name))
    assert json.loads((run.path / "progress.json").read_text())["spent_usd"] > costs
