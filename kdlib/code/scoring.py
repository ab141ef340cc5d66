"""From completions to verdicts, and from verdicts to pass@k."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from kdlib.code import sandbox
from kdlib.code.problems import Problem
from kdlib.code.sandbox import KINDS, USUAL, Limits, printed
from kdlib.metrics.pass_at_k import compared

SHOWN = 6  # problems whose programs are shown
LONGEST = 4000  # characters of a program that is shown

Ran = TypeVar("Ran")  # what became of a program
Answers = Mapping[str, Mapping[str, Sequence[str]]]
"""Model, the teacher first → task_id → what it said, equally many times for each problem."""


def run_all(programs: Sequence[str], run: Callable[[str], Ran] = sandbox.run) -> list[Ran]:
    """What `run` makes of many, as many at a time as there are cores; equal programs once.

    Raises:
        RunError: this system gives no fence; nothing was run.
    """
    distinct = list(dict.fromkeys(programs))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = dict(zip(distinct, pool.map(run, distinct), strict=True))
    return [found[program] for program in programs]


def judge(
    problems: Sequence[Problem], answers: Answers, *, chat: bool = False, limits: Limits = USUAL
) -> list[dict[str, Any]]:
    """Run every answer: a row for each, with its verdict and what the program said."""
    every = [
        (model, problem, sample, text)
        for model, texts in answers.items()
        for problem in problems
        for sample, text in enumerate(texts[problem.task_id])
    ]
    programs = [problem.program(text, chat=chat) for _, problem, _, text in every]
    verdicts = run_all(programs, partial(sandbox.run, limits=limits))
    return [
        {
            "model": model,
            "task_id": problem.task_id,
            "sample": sample,
            "answer": text,
            "verdict": verdict.name,
            "passed": verdict.passed,
            "message": verdict.message,
            "output": verdict.output,
            "seconds": round(verdict.seconds, 3),
        }
        for (model, problem, sample, text), verdict in zip(every, verdicts, strict=True)
    ]


def results_of(
    problems: Sequence[Problem], rows: Sequence[Mapping[str, Any]], ks: Sequence[int], **options: Any
) -> dict[str, Any]:
    """What came of the models' programs: pass@k, differences, failures by kind, and some of the programs.

    Args:
        rows: as `judge` returns them, the teacher's first.
        options: of `compared`.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    samples = len(rows) // (len(models) * len(problems))
    counts = {name: Counter(row["task_id"] for row in rows if row["model"] == name and row["passed"])
              for name in models}  # fmt: skip
    passed = {name: [count[problem.task_id] for problem in problems] for name, count in counts.items()}
    found = compared(samples, passed, ks, **options)
    for name, entry in found["models"].items():
        kinds = Counter(row["verdict"] for row in rows if row["model"] == name)
        entry["verdicts"] = dict(sorted(kinds.items(), key=lambda pair: (_place(pair[0]), -pair[1])))
    return {**found, "problems": len(problems), "samples": samples, "shown": _shown(problems, rows)}


def _place(verdict: str) -> int:
    return KINDS.index(verdict.partition(":")[0])


def _shown(problems: Sequence[Problem], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first samples on some problems spread over all, as text that can be printed."""
    chosen = problems[:: -(-len(problems) // SHOWN)]
    return [
        {
            "task_id": printed(problem.task_id),
            "prompt": printed(problem.prompt),
            "answers": {
                row["model"]: {
                    "text": printed(row["answer"][:LONGEST]),
                    "verdict": row["verdict"],
                    "message": row["message"],
                }
                for row in rows
                if (row["task_id"], row["sample"]) == (problem.task_id, 0)
            },
        }
        for problem in chosen
    ]
