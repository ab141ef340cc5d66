"""From questions and answers to rows whose prompt is given and whose answer is learned.

Of a multiple choice the right choice is learned, and every choice of every held-out question stands in
`Prepared.choices` to be scored.

A multiple choice is written as lm-eval writes it, `Question: …\\nAnswer:` and ` <choice>`, without chat
template or end of text after it: what is trained is what is scored.  A free answer is written in the chat
template where there is one, and ends as the model is to end it: with the template's end of turn, or EOS.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import datasets
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.config.data import DataConfig
from kdlib.data.batches import Prepared, collate, fingerprint, vocabulary_of
from kdlib.data.pairs import limits, vocabularies, with_teacher
from kdlib.data.qa_rows import Item, check_one_answer, split_items
from kdlib.errors import ModelError
from kdlib.questions.forms import form_of
from kdlib.sources.places import read_splits
from kdlib.sources.progress import Told
from kdlib.sources.rows import AT_ONCE, refuse_rows
from kdlib.tokens.answers import NO_END, Encoded, Fault, Talk, attempted, continued, conversations
from kdlib.tokens.spans import PairReader
from kdlib.tokens.vocabulary import beginning

INT, TEXT, IDS = datasets.Value("int32"), datasets.Value("string"), datasets.List(datasets.Value("int32"))
ROWS = datasets.Features(
    {"input_ids": IDS, "prompt_tokens": INT, "text": TEXT, "read_only": IDS, "group": TEXT}
)
ASKED = {"item": INT, "choice": INT, "is_answer": datasets.Value("bool"), "text": TEXT, "question": TEXT}
CHOICES = datasets.Features({**ASKED, "characters": INT, "input_ids": IDS, "prompt_tokens": INT})
Write = Callable[[Sequence[Item]], list[list[Encoded] | Fault]]


def prepare(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, teacher: Tokenizer | None = None
) -> Prepared:
    """Read, split by question and tokenize; nothing is cut, and nothing left out but exact repetitions.

    All depends on the rows and `data.split_seed` (else the seed) alone.

    Args:
        teacher: its tokenizer, where it reads with another, and in its own chat template: rows then have its
            tokens and the spans of both, which are found in the answers.

    Raises:
        DataError: nothing to read, not the named columns, or rows of which nothing can be asked.
        ModelError: of one of two tokenizers it is not known which bytes its tokens stand for.
    """
    seed = seed if config.split_seed is None else config.split_seed
    source = {name: rows for name, rows in read_splits(config).items() if len(rows)}
    form = form_of(config, source["train"].column_names)
    notes = {
        "source": config.source,
        "form": form.kind,
        "columns": str(form),
        "columns_not_read": [*form.unread],
    }
    splits = split_items(config, source, form, seed=seed, notes=notes)
    check_one_answer(config, [item for items in splits.values() for item in items])
    rows, choices = {}, {}
    written = encoded_choices if form.kind == "multiple choice" else encoded_response
    if form.kind != "multiple choice":
        written = partial(written, template=config.chat_template)
        every = [each for each in (tokenizer, teacher) if each]
        if config.chat_template and not any(isinstance(each.chat_template, Mapping) for each in every):
            raise ModelError(
                f"data.chat_template: found {config.chat_template}, and {tokenizer.name_or_path} has one "
                "template, without a name; leave it out"
            )
    write = partial(written, tokenizer=tokenizer, first=beginning(tokenizer))
    their_write = partial(written, tokenizer=teacher, first=beginning(teacher)) if teacher else None
    reader = PairReader(tokenizer, teacher) if teacher else None
    for name, items in splits.items():
        is_scored = form.kind == "multiple choice" and name != "train"
        learned, every, longest = _encoded(config, name, items, write, is_scored=is_scored)
        limit = config.max_train_rows if name == "train" else config.max_eval_rows
        if limit is not None and limit < len(items):
            taken = sorted(random.Random(seed).sample(range(len(items)), limit))
            items, learned, longest = ([each[n] for n in taken] for each in (items, learned, longest))
            every = [every[n] for n in taken] if is_scored else []
        rows[name] = _rows(items, learned)
        if is_scored:
            choices[name] = _choices(items, every)
        if teacher:
            theirs, all_theirs, _ = _encoded(config, name, items, their_write, teacher, is_scored=is_scored)
            rows[name], lost = with_teacher(rows[name], learned, theirs, reader)
            shown = [f"{items[number].where}: {learned[number].text[:60]!r}" for number in lost[:3]]
            notes |= {f"{name}_documents_not_aligned": len(lost), f"{name}_first_not_aligned": shown}
            if name in choices:
                flat = [[row for each in side for row in each] for side in (every, all_theirs)]
                choices[name], _ = with_teacher(choices[name], *flat, reader)
        found = {
            "documents": len({item.question for item in items}),
            "documents_shorter_than_two_tokens": 0,
            "rows": len(items),
            "tokens": sum(len(row.input_ids) for row in learned),
            "learned_tokens": sum(row.learned for row in learned),
            "longest": max(longest),
        }
        if form.kind == "messages":
            found["turns_read_only"] = sum(row.turns_read_only for row in learned)
        elif form.kind == "multiple choice":
            found["choices"] = sum(len(item.answers) for item in items)
        notes |= {f"{name}_{what}": figure for what, figure in found.items()}
    sides = {name: {item.group for item in items if item.group} for name, items in splits.items()}
    held = set().union(*(each for name, each in sides.items() if name != "train"))
    notes["groups_on_two_sides"] = len(held & sides["train"])
    notes["units"] = "groups of questions" if config.group else "questions"
    notes["each_document_begins_with"] = tokenizer.decode(beginning(tokenizer))
    notes["fingerprint"] = fingerprint(*rows.values(), *choices.values())
    pads = {"teacher_pad_id": teacher.pad_token_id} if teacher else {}
    return Prepared(
        **rows,
        notes=notes,
        collate=partial(collate, pad_id=tokenizer.pad_token_id, **pads),
        vocabulary=vocabulary_of(tokenizer),
        choices=choices,
        vocabularies=vocabularies(tokenizer, teacher) if teacher else None,
    )


def _encoded(
    config: DataConfig,
    name: str,
    items: Sequence[Item],
    write: Write,
    teacher: Tokenizer | None = None,
    *,
    is_scored: bool,
) -> tuple[list[Encoded], list[list[Encoded]], list[int]]:
    """Of each item what is learned; of those that are scored every choice; the tokens of its longest row.

    None is cut to data.max_length, or as the teacher's.
    """
    most = limits(teacher, config.max_length)[1] if teacher else config.max_length
    learned, every, longest, broken, long = [], [], [], [], []
    tell = Told(f"tokenizing {name}", len(items), "questions")
    for begin in range(0, len(items), AT_ONCE):
        part = items[begin : begin + AT_ONCE]
        for item, rows in zip(part, write(part), strict=True):
            if isinstance(rows, Fault):
                broken.append(f"{item.where}: {rows}")
                continue
            row = max(rows, key=lambda row: len(row.input_ids))
            longest.append(len(row.input_ids))
            if longest[-1] > most:
                long.append(f"{item.where}: {longest[-1]} tokens, {row.prompt_tokens} before the answer")
            learned.append(rows[item.right])
            if is_scored:
                every.append(rows)
        tell(begin + len(part))
    whose = "the teacher's tokens" if teacher else "tokens"
    refuse_rows(config, broken, f"of {name} that cannot be written as {whose}; mend them, or take them out")
    what = f"longer than data.max_length = {most}, whose answers would be cut; raise data.max_length to "
    what += f"{max(longest)}"
    if teacher:
        what = f"longer than the {most} tokens that the teacher's tokenizer allows; name another teacher"
    refuse_rows(config, long, f"of {name} {what}, or take them out")
    return learned, every, longest


def _rows(items: Sequence[Item], learned: Sequence[Encoded]) -> Dataset:
    """What is learned of each item: its right choice, or its response."""
    columns = {
        "input_ids": [row.input_ids for row in learned],
        "prompt_tokens": [row.prompt_tokens for row in learned],
        "text": [item.question for item in items],
        "read_only": [row.read_only for row in learned],
        "group": [item.group for item in items],
    }
    made = _table(columns, ROWS)
    return made.remove_columns([name for name in ("read_only", "group") if not any(columns[name])])


def _choices(items: Sequence[Item], encoded: Sequence[Sequence[Encoded]]) -> Dataset:
    """Every choice of every item, a row each, in order."""
    both = enumerate(zip(items, encoded, strict=True))
    rows = [
        (number, choice, choice == item.right, answer, item.question, len(answer), row)
        for number, (item, each) in both
        for choice, (answer, row) in enumerate(zip(item.answers, each, strict=True))
    ]
    *columns, made = zip(*rows, strict=True)
    tokens = [row.input_ids for row in made], [row.prompt_tokens for row in made]
    return _table(dict(zip(CHOICES, [*columns, *tokens], strict=True)), CHOICES)


def _table(columns: Mapping[str, Sequence], features: datasets.Features) -> Dataset:
    """As `Dataset.from_dict`, which looks at every number."""
    schema = features.arrow_schema
    return Dataset(
        pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema)
    )


def encoded_choices(
    items: Sequence[Item], tokenizer: Tokenizer, first: Sequence[int]
) -> list[list[Encoded] | Fault]:
    """Each prompt with each choice in turn; `first` begins every row ([BOS], or nothing)."""
    both = [
        (f"Question: {item.question}\nAnswer:", f" {choice}") for item in items for choice in item.answers
    ]
    rows = iter(continued(both, tokenizer, first))
    return list(attempted(_with_tokens, items, ([next(rows) for _ in item.answers] for item in items)))


def _with_tokens(item: Item, made: list[Encoded]) -> list[Encoded]:
    for number, (choice, each) in enumerate(zip(item.answers, made, strict=True)):
        if each.learned < 1:
            raise Fault(f"choice {number}, {choice!r}, makes no token of its own after the prompt")
    return made


def encoded_response(
    items: Sequence[Item], tokenizer: Tokenizer, first: Sequence[int], template: str | None = None
) -> list[list[Encoded] | Fault]:
    """Each free answer after its prompt, one row; `template`: the name of one of several."""
    if tokenizer.chat_template:
        return conversations([item.talk or _talk(item) for item in items], tokenizer, template)
    if tokenizer.eos_token_id is None:
        return [Fault(NO_END)] * len(items)
    both = [(item.question, item.answers[0]) for item in items if item.talk is None]
    spaced = [
        (prompt, response if prompt[-1].isspace() or response[0].isspace() else f" {response}")
        for prompt, response in both
    ]
    rows = iter(continued(spaced, tokenizer, first, [tokenizer.eos_token_id]))
    what = "messages need a chat template, and the tokenizer has none; write prompt and response"
    return [[next(rows)] if item.talk is None else Fault(what) for item in items]


def _talk(item: Item) -> Talk:
    """A question and its answer as a conversation."""
    both = zip(("user", "assistant"), (item.question, item.answers[0]), strict=True)
    return Talk(json.dumps([{"role": role, "content": content} for role, content in both]))
