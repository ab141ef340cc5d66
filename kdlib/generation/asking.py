"""Asks what has no answer yet: so many at a time, within the budget; each answer is on disk as it comes."""

import asyncio
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kdlib.errors import TeacherError
from kdlib.generation.answers import Answer, AnswerLog, Failure
from kdlib.generation.prices import Budget, Price, estimated_tokens, most
from kdlib.generation.teachers import Spent, Teacher, Tries
from kdlib.generation.wires import NoReply, Reply
from kdlib.prompts.prompt import Prompt

IN_A_ROW = 10  # prompts without an answer, beside those under way: then nobody is there
LOOK_S = 0.2
BATCH = 10_000  # prompts; OpenAI takes 50,000 and 200 MB
POLL_S = 30.0
ALIKE = 8  # batches of a local teacher within which prompts are put by length
Named = tuple[str, Prompt]  # key, prompt


@dataclass
class Asking:
    """One asking of many prompts; ends early by its budget, its teacher, or who asks it to stop.

    Attributes:
        error: why no other prompt would have an answer.
        over: the budget has no room for one more.
    """

    log: AnswerLog
    budget: Budget
    price: Price | None
    max_tokens: int
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    error: TeacherError | None = None
    over: bool = False
    in_a_row: int = 0
    tries: dict[asyncio.Task[None], Tries] = field(default_factory=dict)

    async def by_network(self, teacher: Teacher, prompts: Sequence[Named], at_once: int) -> None:
        """Ask these; returns when all have ended, or when all that was under way at a stop has."""
        left = iter(prompts)
        workers = {asyncio.create_task(self._work(teacher, left, at_once)) for _ in range(at_once)}
        try:
            while workers:
                ended, workers = await asyncio.wait(workers, timeout=LOOK_S)
                for each in ended:  # a disk that refuses ends all
                    each.cancelled() or each.result()
                if self.stop.is_set():  # what waits for its turn, or to try again, has nothing to lose
                    for worker in workers:
                        if not (tries := self.tries.get(worker)) or not tries.paid:
                            worker.cancel()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def locally(self, teacher: Any, prompts: Sequence[Named], needed: set[str]) -> None:
        """Ask a model in this process; the batches depend on all prompts, not on which are still needed."""
        ordered = of_like_lengths(prompts, ALIKE * teacher.batch_size)
        for begin in range(0, len(ordered), teacher.batch_size):
            group = ordered[begin : begin + teacher.batch_size]
            if self.stop.is_set():
                return
            if not needed & {key for key, _ in group}:
                continue
            if not self.budget.fits(teacher.next_cost):
                self.over = True
                return
            replies = await asyncio.to_thread(teacher.replies, [prompt for _, prompt in group], begin)
            self.log.add("hours", usd=teacher.last_cost)
            self.budget.spent += teacher.last_cost
            for (key, _), reply in zip(group, replies, strict=True):
                if key in needed and isinstance(reply, NoReply):
                    self.log.add_failure(key, Failure(str(reply)))
                elif key in needed:
                    self.log.add_answer(key, Answer(reply.text, reply.finish, reply.usage, None, reply.model))

    async def by_batch(self, teacher: Teacher, every: Mapping[str, Prompt], needed: Sequence[Named]) -> None:
        """Read the batches that are out, then send the rest, as much at a time as the budget has room for."""
        out: set[str] = set()
        try:
            for name, batch in list(self.log.batches.items()):
                is_ours = batch.keys[0] in every  # and not of another stage
                if is_ours and await self._read(teacher, name, every):
                    out |= set(batch.keys)
            left = [(key, prompt) for key, prompt in needed if key not in out]
            while left and not self.stop.is_set():
                part, at_most = self._room(left)
                if not part:
                    self.over = True
                    return
                name, keys = uuid.uuid4().hex, [key for key, _ in part]
                self.log.add("batch_made", name=name, keys=keys, at_most=at_most, since=time.time())
                self.log.add("batch_sent", name=name, id=await teacher.submit(name, dict(part)))
                left = left[len(part) :]
                await self._read(teacher, name, every)
        except TeacherError as error:
            self.error = error

    def _room(self, left: Sequence[Named]) -> tuple[list[Named], float]:
        """The first of these that the budget has room for, and what they can cost."""
        part: list[Named] = []
        held = 0.0
        for key, prompt in left[:BATCH]:
            at_most = self._at_most(prompt)
            if not self.budget.fits(held + at_most):
                break
            part.append((key, prompt))
            held += at_most
        return part, held

    async def _read(self, teacher: Teacher, name: str, prompts: Mapping[str, Prompt]) -> bool:
        """Put down what a batch brings, unless asked to stop before; returns whether it was ever sent."""
        batch = self.log.batches[name]
        if batch.id is None:
            found = await teacher.sought(name, len(batch.keys), batch.since)
            if found is None:  # it was never sent
                self.log.add("batch_read", name=name)
                return False
            self.log.add("batch_sent", name=name, id=found)
            batch = self.log.batches[name]
        self.budget.held += batch.at_most
        self.budget.under_way += len(batch.keys)
        while (results := await teacher.results(str(batch.id))) is None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), POLL_S)
            if self.stop.is_set():
                return True
        new = [key for key in batch.keys if key not in self.log.answers]  # else a kill came while it was read
        cost = sum(self._put_down(key, results.get(key), self._at_most(prompts[key])) for key in new)
        self.log.add("batch_read", name=name)
        self.budget.under_way -= len(batch.keys) - 1
        self.budget.settle(batch.at_most, cost)
        return True

    def _put_down(self, key: str, reply: Reply | NoReply | None, at_most: float) -> float:
        """One prompt's part of a batch; returns what it cost."""
        if isinstance(reply, Reply):
            answer = self._answer(reply, at_most)
            self.log.add_answer(key, answer)
            return answer.cost or 0.0
        reply = reply or NoReply("the batch ended without an answer to this")
        cost = at_most if reply.paid else 0.0
        self.log.add_failure(key, Failure(str(reply), self.price and cost, reply.paid))
        return cost

    def _at_most(self, prompt: Prompt) -> float:
        return self.price(most(prompt, self.max_tokens)) if self.price else 0.0

    async def _work(self, teacher: Teacher, left: Iterator[Named], at_once: int) -> None:
        for key, prompt in left:
            at_most = self._at_most(prompt)
            if not await self.budget.reserve(at_most):
                self.over = True
                self.stop.set()
            elif self.stop.is_set():
                self.budget.settle(at_most, 0.0)
            else:
                await self._ask(teacher, key, prompt, at_most)
            if self.in_a_row >= IN_A_ROW + at_once and not self.error:
                why = f"{self.in_a_row} prompts in a row had no answer"
                last = next(reversed(self.log.failures.values())).reason
                self.error = TeacherError(f"{why}, the last: {last}; look at the endpoint, then go on")
                self.stop.set()
            if self.stop.is_set():
                return

    async def _ask(self, teacher: Teacher, key: str, prompt: Prompt, at_most: float) -> None:
        """One prompt, to its end; what is held for it is settled."""
        tries, cost = Tries(partial(self._lose, key, at_most)), 0.0
        failed_before = key in self.log.failures
        self.tries[this := asyncio.current_task()] = tries
        self.log.add("asked", key=key, at_most=at_most)
        try:
            reply = await teacher.reply(prompt, estimated_tokens(prompt) + self.max_tokens, tries)
            answer = self._answer(reply, at_most)
            cost = answer.cost or 0.0
            self.log.add_answer(key, answer)
            self.in_a_row = 0
        except NoReply as error:
            cost = at_most if error.paid else 0.0
            self.log.add_failure(key, Failure(str(error), self.price and cost, error.paid))
            self.in_a_row += not failed_before
        except (TeacherError, Spent) as error:
            self.log.add("withdrawn", key=key)
            self.over |= isinstance(error, Spent)
            self.error = error if isinstance(error, TeacherError) else self.error
            self.stop.set()
        except asyncio.CancelledError:
            if not tries.paid:
                self.log.add("withdrawn", key=key)
            raise
        finally:
            del self.tries[this]
            self.budget.settle(at_most, cost)

    def _answer(self, reply: Reply, at_most: float) -> Answer:
        """What was said, with its cost: the most that it can be where the endpoint counts no tokens."""
        cost = self.price and (self.price(reply.usage) if reply.usage else at_most)
        return Answer(reply.text, reply.finish, reply.usage, cost, reply.model)

    def _lose(self, key: str, at_most: float) -> bool:
        self.log.add("lost", key=key, at_most=at_most)
        return self.budget.lose(at_most)


def of_like_lengths(prompts: Sequence[Named], within: int) -> list[Named]:
    """By length, so that little is padded, but each so many by themselves: a run that stops has all kinds."""
    length = [sum(len(text) for _, text in prompt.messages) for _, prompt in prompts]
    return [prompts[n] for n in sorted(range(len(prompts)), key=lambda n: (n // within, length[n]))]


def counted(prompts: Mapping[str, Prompt], log: AnswerLog, budget: Budget) -> dict[str, Any]:
    """How far an asking is, as progress.json has it."""
    answers = [log.answers[key] for key in prompts if key in log.answers]
    usages = [answer.usage for answer in answers if answer.usage]
    by_category: dict[str, dict[str, int]] = {}
    for key, prompt in prompts.items():
        row = by_category.setdefault(prompt.category, {"prompts": 0, "answered": 0, "failed": 0})
        row["prompts"] += 1
        row["answered"] += key in log.answers
        row["failed"] += key in log.failures
    return {
        "prompts": len(prompts),
        "answered": len(answers),
        "failed": sum(key in log.failures for key in prompts),
        "under_way": budget.under_way,
        "input_tokens": sum(usage.input for usage in usages),
        "cached_tokens": sum(usage.cached for usage in usages),
        "output_tokens": sum(usage.output for usage in usages),
        "spent_usd": budget.spent,
        "held_usd": budget.held,
        "budget_usd": budget.usd,
        "by_category": by_category,
    }
