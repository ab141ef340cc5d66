"""Batch APIs: sent once, read whenever the run goes on, within the budget.

Run: pytest tests/test_generation_batches.py
"""

import json

import pytest
from made_generations import asked, rows_in

from kdlib.config.run import parse
from kdlib.errors import Stopped, TeacherError
from kdlib.generation import answers, asking, run as generation
from kdlib.generation.config import GenerationConfig
from kdlib.generation.teachers import Teacher

TEXTS = ["plain 0", "[empty] 1", "[500] 2", "[shape] 3", "[gone] 4", "[nousage] 5", "plain 6"]


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(asking, "POLL_S", 0.01)


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_batch_brings_what_the_requests_would_bring_at_its_own_price(generations, endpoint, provider):
    config = generations.config(TEXTS, provider, batch=True)
    run = generations.run(config)
    assert asked(run, config) == {"kept": 3, "rejected": 1, "failed": 3, "unasked": 0}
    reasons = {row["prompt"]: row["reason"] for row in rows_in(run, "failed")}
    assert "no: 500" in reasons["[500] 2"]
    assert "cannot be read" in reasons["[shape] 3"]
    assert reasons["[gone] 4"] == "the batch ended without an answer to this"
    plain = next(row for row in rows_in(run, "kept") if row["prompt"] == "plain 0")
    by_hand = (plain["usage"]["input"] * 3 + plain["usage"]["output"] * 15) / 1e6 / 2
    assert plain["cost"] == pytest.approx(by_hand)
    assert len(endpoint.batches) == 1
    asked(run, config)  # what failed for nothing, once more
    assert [len(batch["bodies"]) for batch in endpoint.batches.values()] == [7, 2]
    assert endpoint.paid["plain 0"] == endpoint.paid["[shape] 3"] == 1


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
@pytest.mark.parametrize("moment", ["before its id is known", "while it is waited for", "while it is read"])
def test_a_kill_around_a_batch_loses_nothing_and_sends_nothing_twice(
    generations,
    endpoint,
    provider,
    moment,
    monkeypatch,
):
    config = generations.config([f"plain {n}" for n in range(6)], provider, batch=True)
    run = generations.run(config)
    with monkeypatch.context() as patch:
        submit, add = Teacher.submit, answers.AnswerLog.add_answer

        async def unheard(self, *words):
            await submit(self, *words)
            raise Killed

        async def waited(self, *words):
            raise Killed

        def second(self, *words):
            if self.answers:
                raise Killed
            add(self, *words)

        owner, name, deed = {
            "before its id is known": (Teacher, "submit", unheard),
            "while it is waited for": (Teacher, "results", waited),
            "while it is read": (answers.AnswerLog, "add_answer", second),
        }[moment]
        patch.setattr(owner, name, deed)
        with pytest.raises(Killed):
            asked(run, config)
    assert asked(run, config)["kept"] == 6
    assert len(endpoint.batches) == 1
    assert set(endpoint.paid.values()) == {1}


def test_a_batch_that_was_never_sent_is_sent(generations, endpoint, monkeypatch):
    config = generations.config(["plain"], batch=True)
    run = generations.run(config)

    async def killed(self, *words):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "submit", killed)
        with pytest.raises(Killed):
            asked(run, config)
    assert asked(run, config)["kept"] == 1


def test_a_batch_is_no_larger_than_the_budget(generations, endpoint):
    config = generations.config([f"plain {n}" for n in range(40)], batch=True, budget={"usd": 0.01})
    run = generations.run(config)
    with pytest.raises(Stopped, match="no room for another request"):
        asked(run, config)
    spent = json.loads((run.path / "progress.json").read_text())["spent_usd"]
    assert 0.01 - 200 * 15 / 1e6 < spent <= 0.01
    assert len(endpoint.batches) > 1
    larger = parse({**config.as_dict(), "budget": None}, kind=GenerationConfig)
    assert asked(generation.reopened(generations.root, "made", larger), larger)["kept"] == 40
    assert set(endpoint.paid.values()) == {1}


def test_an_endpoint_without_batches_says_so(generations, endpoint, monkeypatch):
    config = generations.config(["plain"], batch=True)
    run = generations.run(config)
    monkeypatch.setattr(
        endpoint, "batch", lambda request, content: endpoint.send(request, 404, {"error": {}})
    )
    with pytest.raises(TeacherError, match="status 404"):
        asked(run, config)
    assert not endpoint.paid


def test_a_judges_batch_is_not_read_by_the_teacher(generations, endpoint, monkeypatch):
    judge = {"teacher": generations.config([]).as_dict()["teacher"], "prices": {"input": 1, "output": 1}}
    judge["teacher"]["endpoint"]["model"] = "gpt-4.1"
    said = endpoint.said
    monkeypatch.setattr(
        endpoint, "said", lambda prompt, mode: "[[9]]" if "impartial" in prompt else said(prompt, mode)
    )
    config = generations.config(["plain 1", "[500] 2"], batch=True, judge=judge)
    run = generations.run(config)
    results = Teacher.results

    async def killed(self, batch):
        if self.endpoint.model == "gpt-4.1":
            raise Killed
        return await results(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "results", killed)
        with pytest.raises(Killed):
            asked(run, config)
    assert asked(run, config) == {"kept": 1, "rejected": 0, "failed": 1, "unasked": 0}
    assert len(endpoint.batches) == 3  # the teacher's, the judge's, and what failed for nothing once more
    assert max(endpoint.paid.values()) == 1
