"""A teacher in this process: batches that depend on nothing that a kill changes.

Run: pytest tests/test_generation_local.py
"""

import json

import pytest

from kdlib.config.run import parse
from kdlib.errors import ModelError, Stopped
from kdlib.generation import run as generation
from kdlib.generation.asking import of_like_lengths
from kdlib.generation.config import GenerationConfig
from kdlib.generation.local import LocalTeacher
from kdlib.prompts.prompt import Prompt


@pytest.fixture
def config(teacher_folder, tmp_path):
    texts = ["the student learns", "a teacher says what it sees", "words", "come back again", "the", "a a"]
    texts.append("the student " * 40)  # 64 positions
    rows = [{"prompt": text, "category": "function"} for text in texts]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(**sections):
        local = {"model": str(teacher_folder), "batch_size": 3, "precision": "float32", "device": "cpu"}
        raw = {
            "teacher": {"local": local},
            "prompts": {"from": str(tmp_path / "prompts.jsonl")},
            "sampling": {"temperature": 1.0, "top_p": 0.9, "max_tokens": 12},
            **sections,
        }
        return parse(raw, kind=GenerationConfig)

    return made


def made_run(config, root, name):
    return generation.created(root, name, config, generation.prompts_of(config))


def test_a_killed_run_draws_the_same_answers(config, tmp_path):
    settings = config()
    whole, again = (made_run(settings, tmp_path / "runs", name) for name in ("whole", "again"))
    counts = generation.generate(whole, settings)
    assert counts["failed"] == 1
    assert "positions" in json.loads((whole.path / "failed.jsonl").read_text())["reason"]
    lines = (whole.path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (again.path / "answers.jsonl").write_bytes(b"".join(lines[:3]))  # within the first batch
    generation.generate(again, settings)
    for name in ("kept.jsonl", "rejected.jsonl", "failed.jsonl"):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()
    other = config(seed=1)
    third = made_run(other, tmp_path / "runs", "third")
    generation.generate(third, other)
    assert (third.path / "rejected.jsonl").read_bytes() != (whole.path / "rejected.jsonl").read_bytes()


def test_a_batch_says_what_each_prompt_alone_says(config):
    teacher = LocalTeacher(config(sampling={"max_tokens": 12}).stage)
    prompts = [
        Prompt((("user", text),), "a") for text in ("the student learns", "a", "words come back again")
    ]
    together = teacher.replies(prompts, 0)
    alone = [teacher.replies([prompt], 0)[0] for prompt in prompts]
    assert together == alone
    assert all(reply.usage.output <= 12 for reply in together)
    assert {reply.finish for reply in together} <= {"stop", "length"}


def test_batches_hold_prompts_of_like_lengths_and_a_run_that_stops_has_all_kinds():
    lengths = [90, 10, 50, 80, 20, 40, 70, 30, 60]
    prompts = [(str(n), Prompt((("user", "a" * n),), "function")) for n in lengths]
    ordered = [int(key) for key, _ in of_like_lengths(prompts, 6)]
    assert ordered == [10, 20, 40, 50, 80, 90, 30, 60, 70]


def test_a_machine_by_the_hour_is_within_the_budget(config, tmp_path):
    settings = config(prices={"hour": 3600}, budget={"usd": 1e-6})
    run = made_run(settings, tmp_path / "runs", "dear")
    with pytest.raises(Stopped, match="no room for another request"):
        generation.generate(run, settings)
    figures = json.loads((run.path / "progress.json").read_text())
    assert figures["answered"] == 3
    assert figures["spent_usd"] > 0


def test_a_model_that_is_not_there_is_told_before_a_run_is_made(config):
    with pytest.raises(ModelError, match="no such folder"):
        generation.check(parse(config().as_dict(), ["teacher.local.model=./nowhere"], kind=GenerationConfig))
