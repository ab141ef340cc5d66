"""One stage of a run: its prompts are asked of one model, in a thread of their own, watched from outside."""

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from kdlib.errors import KdlibError, Stopped, TeacherError
from kdlib.generation.answers import Answer, AnswerLog, Failure, key_of
from kdlib.generation.asking import Asking, Named, counted
from kdlib.generation.config import Stage
from kdlib.generation.prices import Budget, price_for
from kdlib.generation.teachers import Teacher
from kdlib.prompts.prompt import Prompt
from kdlib.runs.files import go_on, now, write_json
from kdlib.runs.folder import Run
from kdlib.runs.processes import heard, interrupted

EVERY_S = 1.0  # that progress.json is written


def check(stage: Stage) -> None:
    """Raise what would stop a stage, before anything is paid.

    Raises:
        ConfigError: a budget without prices, or a package that is missing.
        TeacherError, ModelError: no key, nobody there, or no such model.
    """
    price_for(stage)
    if stage.teacher.local:
        from kdlib.generation import local

        local.check(stage.teacher.local)
    else:
        driven(_checked(stage))


@dataclass
class Session:
    """What the stages of a run share: its log, its budget, and how it ended early, if it did."""

    run: Run
    log: AnswerLog
    budget: Budget
    again: bool = False  # ask also what failed and may have been paid
    ended: KdlibError | None = None

    def ask(self, stage: Stage, prompts: Sequence[Prompt]) -> list[Answer | Failure | None]:
        """What each prompt got, in their order; None where it was not asked, and then `ended` says why."""
        keys = [key_of(prompt, stage.teacher.identity, stage.drawn) for prompt in prompts]
        named: dict[str, Prompt] = {}
        for key, prompt in zip(keys, prompts, strict=True):
            named.setdefault(key, prompt)
        todo = [(key, prompt) for key, prompt in named.items() if not self.log.has(key, again=self.again)]
        asking = Asking(self.log, self.budget, price_for(stage), stage.sampling.max_tokens)
        if todo and not self.ended:
            self.log.add("began", stage=stage.name)  # from which time is told
            driven(self._watched(stage, asking, named, todo), asking.stop)
            self.ended = self._end_of(asking, stage)
        return [self.log.answers.get(key) or self.log.failures.get(key) for key in keys]

    def _end_of(self, asking: Asking, stage: Stage) -> KdlibError | None:
        if asking.error:
            return TeacherError(f"{asking.error}; {go_on()}")
        if asking.over:
            why = f"the budget of ${self.budget.usd:g} has no room for another request"
            return Stopped(f"{why}; {go_on()} with a larger budget.usd")
        if asking.stop.is_set():
            out = ", ".join(str(batch.id) for batch in self.log.batches.values())
            return Stopped(f"stopped{f'; the endpoint works on {out}' if out else ''}; {go_on()}")
        return None

    async def _watched(
        self, stage: Stage, asking: Asking, prompts: dict[str, Prompt], todo: Sequence[Named]
    ) -> None:
        """Ask, and show how far it is, in the terminal and in progress.json."""
        began = time.monotonic()

        def write() -> dict[str, Any]:
            figures = counted(prompts, self.log, self.budget)
            about = {"stage": stage.name, "seconds": round(time.monotonic() - began, 1), "at": now()}
            write_json(self.run.path / "progress.json", figures | about)
            return figures

        async def watch() -> None:
            with tqdm(total=len(prompts), unit="prompt", desc=stage.name, disable=None) as bar:
                while True:
                    figures = write()
                    bar.update(figures["answered"] + figures["failed"] - bar.n)
                    of = f" of ${self.budget.usd:g}" if self.budget.usd else ""
                    bar.set_postfix_str(f"${self.budget.spent:.2f}{of}")
                    await asyncio.sleep(EVERY_S)

        watching = asyncio.create_task(watch())
        try:
            await _asked(stage, asking, prompts, todo)
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            write()


def driven(work: Coroutine[Any, Any, Any], stop: asyncio.Event | None = None) -> Any:
    """Runs it in a thread of its own, since a notebook's has a loop already.

    A signal sets `stop`, where there is one; a second Ctrl-C, or the first where there is none, cancels it.
    """
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)

    def ask_to_stop() -> None:
        if stop is None:
            interrupted()
        print("stopping: what is under way is waited for; Ctrl-C again leaves it", flush=True)
        loop.call_soon_threadsafe(stop.set)

    with ThreadPoolExecutor(1, "asking") as thread, heard(ask_to_stop, interrupted):
        future = thread.submit(loop.run_until_complete, task)
        try:
            return future.result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(task.cancel)
            wait([future])
            raise
        finally:
            loop.close()


async def _asked(stage: Stage, asking: Asking, every: Mapping[str, Prompt], todo: Sequence[Named]) -> None:
    if stage.teacher.local:
        from kdlib.generation import local

        model = await asyncio.to_thread(local.LocalTeacher, stage)
        await asking.locally(model, list(every.items()), {key for key, _ in todo})
        return
    teacher = Teacher(stage, largest=max(prompt.bytes for _, prompt in todo) + stage.sampling.max_tokens)
    try:
        if stage.batch:
            await asking.by_batch(teacher, every, todo)
        else:
            await asking.by_network(teacher, todo, stage.limits.at_once)
    finally:
        await teacher.close()


async def _checked(stage: Stage) -> None:
    teacher = Teacher(stage)
    try:
        await teacher.check()
    finally:
        await teacher.close()
