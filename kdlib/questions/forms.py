"""Which of the known forms rows have, told by their columns; the forms are a table, forms.yaml."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

from kdlib.config.data import DataConfig
from kdlib.config.sections import read_beside
from kdlib.errors import DataError

Columns = Mapping[str, tuple[str, ...]]  # ours → theirs
NAMED = ("messages", "prompt", "response", "question", "choices", "answer")  # settings of `data:`


@dataclass(frozen=True)
class Form:
    """A kind of rows, and in which columns what it needs stands."""

    kind: str  # messages, prompt and response, or multiple choice
    columns: Columns
    unread: tuple[str, ...] = ()  # columns that say nothing to this form

    def __str__(self) -> str:
        return (
            f"{self.kind} ({'; '.join(f'{ours}: {_all(theirs)}' for ours, theirs in self.columns.items())})"
        )


def form_of(config: DataConfig, columns: Sequence[str]) -> Form:
    """The form of rows with these columns, of which `data.ignore` are not looked at.

    A column that the config names stands for the one of ours that it is named for.

    Raises:
        DataError: none of the known forms, or several; or no column of a name in the config.
    """
    seen = _seen(config, columns)
    named = {ours for ours in NAMED if getattr(config, ours) != ours}
    fits = [(kind, form) for kind, form in KNOWN if named <= _flat(form) <= seen.keys()]
    fullest = [each for each in fits if not any(_flat(each[1]) < _flat(other) for _, other in fits)]
    found = [
        Form(kind, {ours: tuple(chain.from_iterable(map(seen.get, theirs))) for ours, theirs in form.items()})
        for kind, form in fullest
    ]
    if not found:
        raise DataError(
            f"{config.source}: found the columns {', '.join(columns)}; needed are question, choices, answer "
            "(for multiple choice), or prompt and response, or messages, or those of another known form "
            f"(notebooks/guides/questions.md); name yours in data.{', data.'.join(NAMED)}"
        )
    if len(found) > 1:
        raise DataError(
            f"{config.source}: its columns can be read as {'; or as '.join(map(str, found))}; needed is one "
            "reading: leave the columns out that are not meant, in data.ignore: […]"
        )
    (form,) = found
    is_talk = form.kind != "multiple choice"
    every = {**form.columns, **(_beside(config, seen) if is_talk else {})}
    read = {*chain.from_iterable(every.values()), *(config.ignore or ()), config.group}
    unread = tuple(name for name in columns if name not in read)
    if is_talk and (odd := next(filter(ASKED.get, unread), None)):
        raise DataError(
            f"{config.source}: found {odd!r} beside {form}, and it may say {ASKED[odd]}; needed is to know. "
            f"If it says nothing of the kind, write data.ignore: [{odd}]; else name it in data.choices, or "
            "take out the rows that are not to be learned"
        )
    return Form(form.kind, every, unread)


def _beside(config: DataConfig, seen: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """What is read where it is there."""
    found = {ours: [each for each in theirs.split(" | ") if each in seen] for ours, theirs in BESIDE.items()}
    for ours, names in found.items():
        if len(names) > 1:
            raise DataError(
                f"{config.source}: the columns {' and '.join(names)} can both be the {ours}; needed is one: "
                f"leave the other out, as data.ignore: [{names[1]}]"
            )
    return {ours: tuple(seen[names[0]]) for ours, names in found.items() if names}


def _seen(config: DataConfig, columns: Collection[str]) -> dict[str, list[str]]:
    """What forms are told by: each column that is not ignored, and under our names those that are named."""
    seen = {name: [name] for name in columns if name not in (config.ignore or ())}
    renamed = {}
    for ours in NAMED:
        if (theirs := getattr(config, ours)) != ours:
            renamed[ours] = [theirs] if isinstance(theirs, str) else theirs
            for name in renamed[ours]:
                if name not in columns:
                    raise DataError(
                        f"{config.source}: no column {name!r}; it has {', '.join(columns)}: name the one "
                        f"with the {ours} in data.{ours}"
                    )
                seen.pop(name, None)
    return seen | renamed


def _known(table: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, Columns]]:
    """Each form with each choice of its alternatives."""
    for kind, forms in table.items():
        for form in forms:
            cells = [[theirs] if isinstance(theirs, str) else theirs for theirs in form.values()]
            ways = [product(*(each.split(" | ") for each in cell)) for cell in cells]
            for way in product(*ways):
                yield kind, dict(zip(form, way, strict=True))


def _flat(form: Columns) -> set[str]:
    return set(chain.from_iterable(form.values()))


def _all(names: Sequence[str]) -> str:
    return " + ".join(names)


TABLE = read_beside(__file__)
ASKED: dict[str, str] = TABLE.pop("asked")
BESIDE: dict[str, str] = TABLE.pop("beside")
KNOWN = list(_known(TABLE))
