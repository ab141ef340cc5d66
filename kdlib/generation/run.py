"""One run of `kd generate`, from its folder's prompts and log to kept, rejected and failed rows.

runs/<run>/  config.yaml  manifest.json  status.json  prompts.jsonl  answers.jsonl (the log)  progress.json
             kept.jsonl  rejected.jsonl  failed.jsonl
"""

import asyncio
import json
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kdlib.config.run import differences, parse
from kdlib.errors import RunError, Stopped, TeacherError, without_keys
from kdlib.filters.sift import sifted
from kdlib.generation.answers import AnswerLog
from kdlib.generation.asking import Asking, Named, counted
from kdlib.generation.config import GenerationConfig
from kdlib.generation.prices import Budget, price_for
from kdlib.generation.rows import answered_row, key_of
from kdlib.generation.teachers import Teacher
from kdlib.prompts.made import made
from kdlib.prompts.prompt import Prompt, are_alone, plain_row, read_prompts
from kdlib.runs import folder as runs
from kdlib.runs.files import go_on, now, write_json, write_text
from kdlib.runs.folder import Run
from kdlib.runs.interrupts import heard, interrupted

EVERY_S = 1.0  # that progress.json is written


def prompts_of(config: GenerationConfig) -> list[Prompt]:
    """What is asked, without keys: they are kept in files, and go to the teacher so.

    Raises:
        DataError: there is no such file, it is at fault, or too few prompts can be made.
        ConfigError: a template is at fault.
    """
    return [_clean(prompt) for prompt in made(config.prompts, config.seed)]


def check(config: GenerationConfig) -> None:
    """Raise what would stop this config's asking, before anything is paid.

    Raises:
        ConfigError: a budget without prices, or a package that is missing.
        TeacherError: no key, nobody there, or no such model.
    """
    price_for(config)
    if config.teacher.local:
        from kdlib.generation import local

        local.check(config.teacher.local)
    else:
        driven(_checked(config))


def created(root: Path, name: str, config: GenerationConfig, prompts: Sequence[Prompt], **origin: Any) -> Run:
    """A new run's folder, with its prompts."""
    run = runs.create(root, name, config, kind="generation", **origin)
    _write_rows(run.path / "prompts.jsonl", (plain_row(each, alone=are_alone(prompts)) for each in prompts))
    return run


def reopened(root: Path, name: str, config: GenerationConfig) -> Run:
    """A run that goes on, with these limits, budget, prices and filters in place of its own.

    Raises:
        RunError: there is no such run, it is a training's, or it asked something else.
    """
    run = runs.open_run(root, name)
    if run.manifest.get("kind") != "generation":
        raise RunError(f"run {name!r} made no rows; kd run goes on with a training")
    before = parse(run.settings, name=str(run.path / "config.yaml"), kind=GenerationConfig)
    if lines := differences(before.asking(), config.asking()):
        raise RunError(
            f"run {name!r} asked something else, so it cannot go on with this:\n  "
            + "\n  ".join(lines)
            + "\nlimits, budget, prices and filters may differ; for the rest start a new run"
        )
    if lines := differences(before.as_dict(), config.as_dict()):
        write_text(run.path / "config.yaml", config.as_yaml())
        run.add_to_manifest(changed=[*run.manifest.get("changed", []), {"at": now(), "settings": lines}])
    return run


def generate(run: Run, config: GenerationConfig, *, again: bool = False) -> dict[str, int]:
    """Ask what has no answer yet, and write the rows; returns how many are kept, rejected, failed, unasked.

    Args:
        again: ask also what failed and may have been paid.  What failed for nothing always is.

    Raises:
        Stopped: the budget is used up, or a signal asked to stop; the rows so far are written.
        TeacherError: no further prompt would have an answer; likewise.
    """
    prompts = read_prompts(run.path / "prompts.jsonl")
    drawn = config.sampling.as_dict() | ({"seed": config.seed} if config.teacher.local else {})
    keys = [key_of(prompt, config.teacher.identity, drawn) for prompt in prompts]
    named: dict[str, Prompt] = {}
    for key, prompt in zip(keys, prompts, strict=True):
        named.setdefault(key, prompt)
    log = AnswerLog(run.path / "answers.jsonl")
    budget = Budget(config.budget.usd if config.budget else None, log.spent)
    asking = Asking(log, budget, price_for(config), config.sampling.max_tokens)
    todo = [(key, prompt) for key, prompt in named.items() if not log.has(key, again=again)]
    try:
        driven(_asked(run, config, asking, named, todo), asking.stop)
    finally:
        log.close()
    counts = write_files(run, config, prompts, keys, log)
    write_json(run.path / "progress.json", counted(named, log, asking.budget) | counts | {"at": now()})
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    spent = f"${asking.budget.spent:.2f}"
    if asking.error:
        raise TeacherError(f"{asking.error}\n{said}; {spent} spent; {go_on()}")
    if asking.over:
        raise Stopped(
            f"the budget of ${config.budget.usd:g} has no room for another request: {said}; {spent} "
            f"spent; {go_on()} with a larger budget.usd"
        )
    if counts["unasked"]:
        out = ", ".join(str(batch.id) for batch in log.batches.values())
        waits = f"; the endpoint works on {out}" if out else ""
        raise Stopped(f"stopped: {said}; {spent} spent{waits}; {go_on()}")
    print(f"{said}; {spent} spent")
    return counts


def write_files(
    run: Run,
    config: GenerationConfig,
    prompts: Sequence[Prompt],
    keys: Sequence[str],
    log: AnswerLog,
) -> dict[str, int]:
    """kept.jsonl, rejected.jsonl and failed.jsonl, in the order of the prompts; returns how many rows."""
    alone, model = are_alone(prompts), config.teacher.model
    answered = {
        key: (prompt, log.answers[key])
        for key, prompt in zip(keys, prompts, strict=True)
        if key in log.answers
    }
    reasons = dict(zip(answered, sifted(config.filters, list(answered.values())), strict=True))
    files: dict[str, list[dict[str, Any]]] = {"kept": [], "rejected": [], "failed": []}
    seen: dict[str, int] = {}
    unasked = 0
    for number, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
        if key in seen:
            row = plain_row(prompt, alone=alone) | {"reason": f"repeats prompt {seen[key]}"}
            files["rejected"].append(row)
            continue
        seen[key] = number
        if key in answered:
            row, reason = answered_row(prompt, log.answers[key], model, alone=alone), reasons[key]
            files["rejected" if reason else "kept"].append(row | ({"reason": reason} if reason else {}))
        elif failure := log.failures.get(key):
            row = plain_row(prompt, alone=alone) | {"teacher": model, "reason": failure.reason}
            files["failed"].append(row | {"cost": failure.cost})
        else:
            unasked += 1
    for name, rows in files.items():
        _write_rows(run.path / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in files.items()} | {"unasked": unasked}


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


async def _asked(
    run: Run, config: GenerationConfig, asking: Asking, prompts: Mapping[str, Prompt], todo: Sequence[Named]
) -> None:
    log, budget, began = asking.log, asking.budget, time.monotonic()

    async def watch() -> None:
        with tqdm(total=len(prompts), unit="prompt", disable=None) as bar:
            while True:
                figures = counted(prompts, log, budget)
                bar.update(figures["answered"] + figures["failed"] - bar.n)
                bar.set_postfix_str(f"${budget.spent:.2f}{f' of ${budget.usd:g}' if budget.usd else ''}")
                seconds = round(time.monotonic() - began, 1)
                write_json(run.path / "progress.json", figures | {"seconds": seconds, "at": now()})
                await asyncio.sleep(EVERY_S)

    watching = asyncio.create_task(watch())
    try:
        await _by_whom(config, asking, list(prompts.items()), todo)
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def _by_whom(
    config: GenerationConfig, asking: Asking, every: Sequence[Named], todo: Sequence[Named]
) -> None:
    if config.teacher.local:
        from kdlib.generation import local

        teacher = await asyncio.to_thread(local.LocalTeacher, config)
        await asking.locally(teacher, every, {key for key, _ in todo})
        return
    largest = max((prompt.bytes for _, prompt in todo), default=1) + config.sampling.max_tokens
    async_teacher = Teacher(config.teacher, config.sampling, config.limits, largest=largest)
    try:
        if config.batch:
            await asking.by_batch(async_teacher, todo)
        else:
            await asking.by_network(async_teacher, todo, config.limits.at_once)
    finally:
        await async_teacher.close()


async def _checked(config: GenerationConfig) -> None:
    teacher = Teacher(config.teacher, config.sampling, config.limits)
    try:
        await teacher.check()
    finally:
        await teacher.close()


def _clean(prompt: Prompt) -> Prompt:
    return replace(prompt, messages=tuple((role, without_keys(text)) for role, text in prompt.messages))


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
