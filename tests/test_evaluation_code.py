"""Models write programs, which are run and scored; what was written is never written twice."""

import json
from functools import partial

import pytest
import yaml
from conftest import tiny_experiment
from typer.testing import CliRunner

from kdlib.code.problems import Problem
from kdlib.config import run as configs
from kdlib.config.sections import CodeConfig
from kdlib.errors import ConfigError, ModelError, RunError
from kdlib.evaluation import code, completions
from kdlib.evaluation.completions import answers_of
from kdlib.models.loading import load_model, load_tokenizer
from kdlib.plots.comparison import code_message
from kdlib.workbench.cli import app

PROBLEMS = [
    Problem(f"own/{n}", f"def f{n}(x):\n    # {'what ' * n}", "assert True", f"f{n}") for n in range(5)
]
asked = partial(CodeConfig, benchmarks=["own"], allow_execution=True, max_new_tokens=6, batch_size=2)


@pytest.fixture
def benchmark(tmp_path):
    """A file with three problems, of which a program that parses solves the last."""
    rows = [
        {"task_id": f"own/{n}", "prompt": f"def f{n}(x): return 1 #", "entry_point": f"f{n}", "test": test}
        for n, test in enumerate(["assert f0(1) == 2", "1 / 0", "assert f2(1) == 1"])
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_batch_says_what_each_problem_by_itself_does(teacher_folder, tmp_path):
    source = str(teacher_folder)
    together = answers_of("m", source, PROBLEMS, asked(batch_size=5), tmp_path / "a")
    alone = answers_of("m", source, PROBLEMS, asked(batch_size=1), tmp_path / "b")
    assert together == alone
    assert [*together] == [problem.task_id for problem in PROBLEMS]
    model, tokenizer = load_model(source), load_tokenizer(source)
    inputs = tokenizer(PROBLEMS[3].prompt, return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert together["own/3"] == [text]


def test_what_was_written_is_kept_and_only_the_rest_asked_for(teacher_folder, tmp_path, monkeypatch):
    file, settings = tmp_path / "completions.jsonl", asked(samples=3, temperature=1.0)
    whole = answers_of("m", str(teacher_folder), PROBLEMS, settings, tmp_path / "undisturbed")
    generated, calls = completions._generated, []

    def killed(model, tokenizer, problems, settings):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(problems))
        return generated(model, tokenizer, problems, settings)

    monkeypatch.setattr(completions, "_generated", killed)
    with pytest.raises(KeyboardInterrupt):
        answers_of("m", str(teacher_folder), PROBLEMS, settings, file)
    assert len(file.read_text().splitlines()) == 6
    with file.open("a") as opened:
        opened.write('{"key": "cut o')  # as a kill in the middle of writing leaves it
    calls.clear()
    monkeypatch.setattr(completions, "_generated", lambda *a: calls.append(len(a[2])) or generated(*a))
    assert answers_of("m", str(teacher_folder), PROBLEMS, settings, file) == whole
    assert calls == [2, 2, 2, 2, 1]  # nine of fifteen
    calls.clear()
    assert answers_of("m", str(teacher_folder), PROBLEMS, settings, file) == whole
    assert calls == []
    assert len(set(whole["own/0"])) > 1  # samples differ


def test_other_settings_problems_or_weights_are_asked_anew(copied_teacher, tmp_path, monkeypatch):
    calls, generated = [], completions._generated
    monkeypatch.setattr(completions, "_generated", lambda *a: calls.append(1) or generated(*a))

    def new(problems=PROBLEMS[:1], **settings):
        calls.clear()
        answers_of("m", str(copied_teacher), problems, asked(**settings), tmp_path / "file")
        return bool(calls)

    assert new()
    assert not new()
    assert not new(batch_size=4)
    assert new(max_new_tokens=3)
    assert new(temperature=0.5)
    assert new([Problem("own/0", "def g(x):", "assert True", "g")])
    weights = copied_teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert new()


def test_a_prompt_longer_than_the_model_reads_is_refused(teacher_folder, tmp_path):
    long = [Problem("own/long", "x = 1\n" * 64, "", "x")]
    with pytest.raises(ModelError, match="own/long: its prompt has .* reads no more than 64"):
        answers_of("m", str(teacher_folder), long, asked(), tmp_path / "file")
    with pytest.raises(ModelError, match="no chat template"):
        answers_of("m", str(teacher_folder), PROBLEMS, asked(chat=True), tmp_path / "file")


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"allow_execution": False}, "allow_execution: the models' programs"),
        ({"k": [1, 10]}, "k: found 10, but samples is 1"),
        ({"samples": 5}, "samples: 5 at temperature 0 are all the same"),
        ({"benchmarks": []}, "benchmarks"),
        ({"benchmarks": ["a/own.jsonl", "b/own.jsonl"]}, "two are called own"),
    ],
)
def test_what_cannot_be_told_or_was_not_allowed_is_refused(raw_config, settings, fault):
    raw = {**raw_config, "code": {"benchmarks": ["humaneval"], "allow_execution": True, **settings}}
    with pytest.raises(ConfigError, match=fault):
        configs.parse(raw)


def test_a_classifier_writes_no_programs(raw_config):
    raw = {**raw_config, "code": {"benchmarks": ["humaneval"], "allow_execution": True}}
    with pytest.raises(ConfigError, match="a classifier writes no programs"):
        configs.parse({**raw, "task": "sequence-classification", "data": {"source": "x"}})


def test_models_are_scored_beside_each_other(teacher_folder, benchmark, tmp_path):
    words = ["evaluate", f"one={teacher_folder}", f"two={teacher_folder}", "--benchmark", benchmark]
    words += ["-o", "max_new_tokens=4", "--samples", "2", "--temperature", "1", "-k", "1", "-k", "2"]
    refused = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "out")])
    assert isinstance(refused.exception, ConfigError)
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "out"), "--allow-code-execution"])
    assert done.exit_code == 0, done.output
    assert "pass@2" in done.output
    (results,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["models"]) == {"one", "two"}
    assert results["models"]["one"]["verdicts"]["exception: ZeroDivisionError"] > 0
    assert "3 problems, which are few" in results["interval"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "own/2" in page
    assert "Few problems were asked" in page
    assert (tmp_path / "out" / "figures" / "code_own.png").exists()
    assert (tmp_path / "out" / "tables" / "code_own_differences.csv").exists()


def test_without_a_fence_no_model_is_asked(teacher_folder, benchmark, tmp_path, monkeypatch):
    def none(*_):
        raise RunError("no program was run, as this system gives no fence for it")

    monkeypatch.setattr(code.sandbox, "run", none)
    monkeypatch.setattr(code, "answers_of", lambda *_, **__: pytest.fail("asked"))
    settings = asked(benchmarks=[benchmark])
    with pytest.raises(RunError, match="no fence"):
        code.score({"m": str(teacher_folder)}, settings, tmp_path / "out")


def test_the_programs_of_a_run_are_part_of_its_comparison_and_report(teacher_folder, benchmark, tmp_path):
    from kdlib.reports import run as pages
    from kdlib.runs import folder as runs
    from kdlib.workbench.session import Workbench

    raw = tiny_experiment(teacher_folder, tmp_path)
    raw["training"] |= {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "logging_steps": 1}
    raw["code"] = {"benchmarks": [benchmark], "allow_execution": True, "max_new_tokens": 4}
    run = runs.create(tmp_path / "runs", "coded", configs.parse(raw))
    bench = Workbench(run)
    with pytest.raises(RunError, match="not trained yet"):
        code.score_run(run, run.config)
    bench.setup()
    bench.train()
    bench.train_baseline()
    assert bench.compare()["code"][0]["problems"] == 3
    (results,) = json.loads((run.code / "results.json").read_text())
    assert [*results["models"]] == ["teacher", "baseline", "distilled"]
    assert [d["against"] for d in results["differences"]] == ["teacher", "teacher", "baseline"]
    page = pages.render(run, tmp_path / "reports").read_text()
    assert 'id="code"' in page
    assert "own/0" in page
    words = ["evaluate", str(run.path), "--benchmark", benchmark, "--allow-code-execution", "--limit", "1"]
    words += ["-o", "max_new_tokens=4", "--reports", str(tmp_path / "reports")]
    lines = (run.code / "completions.jsonl").read_text()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    assert (run.code / "completions.jsonl").read_text() == lines  # all were there
    assert json.loads((run.code / "results.json").read_text())[0]["problems"] == 1
    assert yaml.safe_load((run.path / "config.yaml").read_text())["code"]["benchmarks"] == [benchmark]


def test_a_title_names_few_models_and_of_many_the_first_and_the_best():
    shares = zip("abcdef", (0.6, 0.2, 0.3, 0.1, 0.2, 0.2), strict=True)
    made = {name: {"pass@1": {"value": value}} for name, value in shares}
    results = {"benchmark": "easy", "problems": 20, "of": 20, "models": made}
    assert code_message(results) == "easy, 20 problems, pass@1: a 60.0%, best of 5 others c 30.0%"
    few = {**results, "models": dict(list(made.items())[:2])}
    assert code_message(few) == "easy, 20 problems, pass@1: a 60.0%, b 20.0%"
