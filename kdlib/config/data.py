"""The section `data`: where the rows are, how they are read, split and cut."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from kdlib.config.sections import Count, Number, Positive, Section, Seed, fraction


def _share_or_split(value: Any) -> float | str:
    """A share of the rows, or the name of one of the source's own splits."""
    share = fraction(value)
    if share is None and isinstance(value, str):
        return value
    if share is None or not 0 < share < 1:
        form = "a share of the rows between 0 and 1, or the name of a split that the source has"
        raise ValueError(f"found {value!r}; it is {form}")
    return share


def _separator(value: Any) -> Any:
    tab = "\t" if value in ("\\t", "tab") else value
    if isinstance(tab, str) and len(tab) != 1:
        raise ValueError(f"found {value!r}; it is one character, or tab")
    return tab


class MixPart(Section):
    """One of several sources of text; its weight is a share of the training rows, where these sum to 1."""

    source: str
    weight: Annotated[Number, Field(ge=0)]
    subset: str | None = None
    text: str | None = None  # the column with the text; data.text where None


HUB_IDS = {
    **dict.fromkeys(("dbpedia", "dbpedia14", "dbpedia_14", "dbpedia-14"), "fancyzhx/dbpedia_14"),
    **dict.fromkeys(("ag_news", "agnews"), "fancyzhx/ag_news"),
    **{"imdb": "stanfordnlp/imdb", "sst2": "stanfordnlp/sst2"},
}
"""Data sets on the hub whose rows have classes, by the short names that people call them."""


class DataConfig(Section):
    """The text: where it is, how it is split and cut."""

    source: str  # of a mix all its sources' names
    mix: Annotated[list[MixPart], Field(min_length=2)] | None = None  # several sources, each with a weight
    streaming: bool = False  # of a corpus too large to be had: as much of its beginning as max_steps needs
    subset: str | None = None
    train: str = "train"  # the split to train on, by the source's name for it
    field: str | None = None  # of JSON: the key under which one object holds all rows
    separator: Annotated[str, BeforeValidator(_separator)] | None = None  # of a table's fields; "," or a tab
    header: list[str] | Literal[False] | None = None  # of a table that names no columns; false: by number
    encoding: str | None = None  # of text, JSON and tables; UTF-8 where None
    text: str | list[str] = "text"  # of a classification, several columns make one text, a line each
    label: str = "label"
    labels: list[str] | None = None  # the classes' names, where the source gives numbers alone
    merge_labels: bool = False  # names of a class that differ in case, spaces or Unicode's forms are one
    skip_unusable: bool = False  # rows of which nothing can be learned are left out and counted, not refused
    group: str | None = None  # the column with what must not be divided: an author, a patient, a page
    question: str = "question"
    choices: str | list[str] = "choices"  # a column of lists, or a column for each
    answer: str = "answer"
    answer_as: Literal["label", "from_0", "from_1", "letter", "text"] | None = None  # None: told by the rows
    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    ignore: list[str] | None = None  # columns, and what stands in messages, that are not looked at
    chat_template: str | None = None  # which one, of a tokenizer that has several by name
    validation: Annotated[Any, AfterValidator(_share_or_split)] = 0.1
    test: Annotated[Any, AfterValidator(_share_or_split)] | None = None
    split_seed: Seed | None = None
    packing: bool = True
    max_length: Annotated[Count, Field(ge=2)] = 1024
    max_train_rows: Positive | None = None
    max_eval_rows: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        """A mix is called by its sources."""
        parts = raw.get("mix") if isinstance(raw, Mapping) else None
        if isinstance(parts, list) and raw.get("source") is None:
            names = [str(part.get("source")) for part in parts if isinstance(part, Mapping)]
            return {**raw, "source": " + ".join(names)}
        return raw

    @model_serializer(mode="wrap")
    def _stated(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what few have, so that older runs and sweeps are known again."""
        rare = {"mix", "streaming", "answer_as", "prompt", "response", "messages", "ignore", "chat_template"}
        rare |= {"train", "field", "separator", "header", "encoding", "merge_labels", "skip_unusable"}
        usual = {name: type(self).model_fields[name].default for name in rare}
        return {n: value for n, value in dump(self).items() if n not in usual or value != usual[n]}

    @model_validator(mode="after")
    def _mixes(self) -> "DataConfig":
        names = [part.source for part in self.mix or ()]
        if self.mix and not sum(part.weight for part in self.mix):
            raise ValueError("mix: the weights sum to nothing; give one source or more a weight above 0")
        if self.mix and (self.source != " + ".join(names) or self.subset):
            raise ValueError("`mix` names the sources, each with its `subset`; leave those of data out")
        if self.streaming and (self.mix or self.group):
            found = "mix" if self.mix else "group"
            raise ValueError(f"streaming: reads the documents of one source as they come; leave {found} out")
        if self.mix and len({(part.source, part.subset) for part in self.mix}) < len(names):
            raise ValueError("mix: a source stands there twice; name each once, with the sum of the weights")
        return self
