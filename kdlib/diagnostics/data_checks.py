"""What the doctor asks of the text: is there something to predict in every document, and enough held out
that is not trained on?
"""

from collections.abc import Iterator

from datasets import Dataset

from kdlib.data.text import tokenized
from kdlib.diagnostics.context import Subject
from kdlib.diagnostics.findings import Finding

LEFT_OUT = 0.05  # of the documents
CUT_DOCUMENTS, CUT_TOKENS = 0.10, 0.05  # shares
REPEATED = 0.01  # of the held-out documents
MOSTLY = 0.5  # of the documents
FEW_ROWS, FEW_TOKENS = 10, 1000  # held out
SAMPLE = 200  # documents by which another column is judged


def documents_have_something_to_predict(subject: Subject) -> Iterator[Finding]:
    """Documents of fewer than two tokens have no kept token, and are left out."""
    # rows without a text, a class or an answer are refused when they are read
    if subject.config.task != "causal-lm":
        return
    split = subject.split
    column = subject.config.data.text
    for name in ("train", "validation"):
        total, short = len(split[name]), _too_short(split[name], column, subject)
        if short <= LEFT_OUT * total:
            continue
        sample = split[name].select(range(min(SAMPLE, total)))
        others = [
            other
            for other in _other_texts(sample, column)
            if _too_short(sample, other, subject) <= LEFT_OUT * len(sample)
        ]
        yield Finding(
            "critical" if short == total else "warning",
            "data.text",
            (
                f"{short} of the {total} {name} documents in the column {column!r} are shorter than two "
                "tokens "
                "and left out"
            )
            + f"; those in {', '.join(others)} are not" * bool(others),
            (
                "the first token of a row is never predicted, so such "
                "a row has no kept token and teaches nothing"
            ),
            f"name the column with the text: {others[0]}"
            if others
            else "look at the text, and leave such rows out of it",
            {"data.text": others[0]} if len(others) == 1 else None,
        )


def documents_are_not_cut(subject: Subject) -> Iterator[Finding]:
    """Without packing, what is longer than a row is lost."""
    notes, is_packable = subject.prepared.notes, subject.config.task == "causal-lm"
    for name in ("train", "validation"):
        # of which some are not taken
        documents = notes[f"{name}_documents"] if is_packable else notes[f"{name}_rows"]
        documents -= notes.get(f"{name}_documents_shorter_than_two_tokens", 0)
        shortened, lost = (
            notes.get(f"{name}_documents_cut", 0) / max(documents, 1),
            notes.get(f"{name}_share_of_tokens_cut_off", 0.0),
        )
        if shortened > CUT_DOCUMENTS or lost > CUT_TOKENS:
            of_rows = subject.config.task == "sequence-classification"
            yield Finding(
                "note" if of_rows else "warning",
                "data.max_length",
                f"{shortened:.0%} of the {name} documents are longer than {subject.config.data.max_length} "
                "tokens and cut, which loses "
                f"{lost:.0%} of all tokens; the longest has {notes[f'{name}_longest_document']}",
                "what is cut off is not read: see whether the beginning of a text tells its class"
                if of_rows
                else "what is cut off is never trained on: the ends of long texts, or whole answers",
                f"raise max_length{', or set packing: true' * is_packable}",
            )


def held_out_text_is_new(subject: Subject) -> Iterator[Finding]:
    """No held-out document is trained on; where kdlib splits, it sees to that."""
    column, notes = subject.config.data.text, subject.prepared.notes
    if subject.config.task == "question-answering":  # see question_checks
        return
    # of classes, every text is on one side
    split = subject.split if subject.config.task == "causal-lm" else None
    trained = set(split["train"][column]) if split else set()
    repeated = sum(text in trained for text in split["validation"][column]) if split else 0
    if split and repeated > REPEATED * len(split["validation"]):
        yield Finding(
            "warning",
            "data.source",
            f"{repeated} of the {len(split['validation'])} validation documents are training documents too",
            "held-out figures then tell what was learned by heart",
            "leave them out of one side, or give the source without its own split",
        )
    out = notes.get("duplicate_documents_left_out", 0)
    total = notes["train_documents"] + notes["validation_documents"] + out
    if out > LEFT_OUT * total:
        yield Finding(
            "warning" if out > MOSTLY * total else "note",
            "data.text",
            f"{out} of {total} documents came twice and were left out",
            "each text is kept once, on one side",
            f"see whether {column!r} is the column with the text",
        )


def enough_is_held_out(subject: Subject) -> Iterator[Finding]:
    """A comparison on a handful of rows tells nothing."""
    if subject.config.task != "causal-lm":  # see class_checks and question_checks
        return
    notes = subject.prepared.notes
    rows, tokens = notes["validation_rows"], notes["validation_tokens"]
    if rows < FEW_ROWS or tokens < FEW_TOKENS:
        limit = subject.config.data.max_eval_rows
        where = "data.max_eval_rows" if limit is not None and rows == limit else "data.validation"
        yield Finding(
            "warning",
            where,
            f"{rows} rows with {tokens} tokens are held out",
            (
                f"below {FEW_ROWS} rows or {FEW_TOKENS:,} tokens the intervals of a comparison are too wide "
                "to "
                "tell models apart"
            ),
            "hold out more, or give more text",
        )


def _too_short(documents: Dataset, column: str, subject: Subject) -> int:
    """How many have fewer than two tokens in this column."""
    texts = documents.select_columns([column])
    return len(texts) - len(tokenized(texts, column, subject.tokenizer))


def _other_texts(documents: Dataset, column: str) -> list[str]:
    """The other columns with a text in every document."""
    return [
        name
        for name in documents.column_names
        if name != column and all(isinstance(text, str) for text in documents[name])
    ]


DATA_CHECKS = (
    documents_have_something_to_predict,
    documents_are_not_cut,
    held_out_text_is_new,
    enough_is_held_out,
)
