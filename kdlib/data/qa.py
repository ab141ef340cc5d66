"""From questions and answers to rows whose prompt is given and whose answer is learned.

Of a multiple choice the right choice is learned, and every choice of every held-out question stands in
`Prepared.choices` to be scored.

A multiple choice is written as lm-eval writes it, `Question: …\\nAnswer:` and ` <choice>`, without chat
template or end of text after it: what is trained is what is scored.  A free answer is written in the chat
template where there is one, and ends as the model is to end it: with the template's end of turn, or EOS.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from os.path import commonprefix
from typing import Any

import datasets
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.config.sections import DataConfig
from kdlib.data.batches import Prepared, collate, fingerprint, vocabulary_of
from kdlib.data.pairs import limits, vocabularies, with_teacher
from kdlib.data.qa_rows import Encoded, Fault, Item, check_one_answer, collected, form_of, split_items
from kdlib.sources.places import read_splits
from kdlib.sources.rows import refuse_rows
from kdlib.tokens.spans import PairReader
from kdlib.tokens.vocabulary import beginning

INT, TEXT, IDS = datasets.Value("int32"), datasets.Value("string"), datasets.List(datasets.Value("int32"))
ROWS = datasets.Features(
    {"input_ids": IDS, "prompt_tokens": INT, "text": TEXT, "read_only": IDS, "group": TEXT}
)
ASKED = {"item": INT, "choice": INT, "is_answer": datasets.Value("bool"), "text": TEXT, "question": TEXT}
CHOICES = datasets.Features({**ASKED, "characters": INT, "input_ids": IDS, "prompt_tokens": INT})


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
    form, notes = form_of(config, source["train"]), {"source": config.source}
    splits = split_items(config, source, form, seed=seed, notes=notes)
    check_one_answer(config, [item for items in splits.values() for item in items])
    rows, choices = {}, {}
    written = encoded_choices if form == "multiple choice" else encoded_response
    write = partial(written, tokenizer=tokenizer, first=beginning(tokenizer))
    their_write = partial(written, tokenizer=teacher, first=beginning(teacher)) if teacher else None
    reader = PairReader(tokenizer, teacher) if teacher else None
    for name, items in splits.items():
        encoded = _encoded(config, name, items, write)
        limit = config.max_train_rows if name == "train" else config.max_eval_rows
        if limit is not None and limit < len(items):
            taken = sorted(random.Random(seed).sample(range(len(items)), limit))
            items, encoded = [items[n] for n in taken], [encoded[n] for n in taken]
        learned = [each[item.right] for item, each in zip(items, encoded, strict=True)]
        rows[name] = _rows(items, learned)
        if form == "multiple choice" and name != "train":
            choices[name] = _choices(items, encoded)
        if teacher:
            theirs = _encoded(config, name, items, their_write, teacher)
            right = [each[item.right] for item, each in zip(items, theirs, strict=True)]
            rows[name], lost = with_teacher(rows[name], learned, right, reader)
            shown = [f"{items[number].where}: {learned[number].text[:60]!r}" for number in lost[:3]]
            notes |= {f"{name}_documents_not_aligned": len(lost), f"{name}_first_not_aligned": shown}
            if name in choices:
                flat = [[row for each in side for row in each] for side in (encoded, theirs)]
                choices[name], _ = with_teacher(choices[name], *flat, reader)
        found = {
            "documents": len({item.question for item in items}),
            "documents_shorter_than_two_tokens": 0,
            "rows": len(items),
            "tokens": sum(len(row.input_ids) for row in learned),
            "learned_tokens": sum(row.learned for row in learned),
            "longest": max(len(row.input_ids) for each in encoded for row in each),
        }
        if form == "messages":
            found["turns_read_only"] = sum(row.turns_read_only for row in learned)
        elif form == "multiple choice":
            found["choices"] = sum(len(item.answers) for item in items)
        notes |= {f"{name}_{what}": figure for what, figure in found.items()}
    sides = {name: {item.group for item in items if item.group} for name, items in splits.items()}
    held = set().union(*(each for name, each in sides.items() if name != "train"))
    notes["groups_on_two_sides"] = len(held & sides["train"])
    notes["units"] = "groups of questions" if config.group else "questions"
    notes |= {"form": form, "each_document_begins_with": tokenizer.decode(beginning(tokenizer))}
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
    write: Callable[[Item], list[Encoded]],
    teacher: Tokenizer | None = None,
) -> list[list[Encoded]]:
    """Each item's rows: one for each choice, or one; none is cut to data.max_length, or as the teacher's."""
    wheres, most = [item.where for item in items], config.max_length
    most = limits(teacher, most)[1] if teacher else most
    whose = "the teacher's tokens" if teacher else "tokens"
    what = f"of {name} that cannot be written as {whose}; mend them, or take them out"
    made = collected(config, what, wheres, write, items)
    longest = [max(each, key=lambda row: len(row.input_ids)) for each in made]
    faults = [
        f"{where}: {len(row.input_ids)} tokens, {row.prompt_tokens} before the answer"
        for where, row in zip(wheres, longest, strict=True)
        if len(row.input_ids) > most
    ]
    needed = max(len(row.input_ids) for row in longest)
    what = (
        f"longer than data.max_length = {most}, whose answers would be cut; raise data.max_length to {needed}"
    )
    if teacher:
        what = f"longer than the {most} tokens that the teacher's tokenizer allows; name another teacher"
    refuse_rows(config, faults, f"of {name} {what}, or take them out")
    return made


def _rows(items: Sequence[Item], learned: Sequence[Encoded]) -> Dataset:
    """What is learned of each item: its right choice, or its response."""
    columns = {
        "input_ids": [row.input_ids for row in learned],
        "prompt_tokens": [row.prompt_tokens for row in learned],
        "text": [item.question for item in items],
        "read_only": [list(row.read_only) for row in learned],
        "group": [item.group for item in items],
    }
    made = Dataset.from_dict(columns, features=ROWS)
    return made.remove_columns([name for name in ("read_only", "group") if not any(columns[name])])


def _choices(items: Sequence[Item], encoded: Sequence[Sequence[Encoded]]) -> Dataset:
    """Every choice of every item, a row each, in order."""
    rows = [
        {
            "item": number,
            "choice": choice,
            "question": item.question,
            "text": answer,
            "characters": len(answer),
            "is_answer": choice == item.right,
            "input_ids": row.input_ids,
            "prompt_tokens": row.prompt_tokens,
        }
        for number, (item, each) in enumerate(zip(items, encoded, strict=True))
        for choice, (answer, row) in enumerate(zip(item.answers, each, strict=True))
    ]
    return Dataset.from_list(rows, features=CHOICES)


def encoded_choices(item: Item, tokenizer: Tokenizer, first: Sequence[int]) -> list[Encoded]:
    """The prompt with each choice in turn; `first` begins every row ([BOS], or nothing)."""
    asked = f"Question: {item.question}\nAnswer:"
    made = [continued(asked, f" {choice}", tokenizer, first) for choice in item.answers]
    for number, (choice, each) in enumerate(zip(item.answers, made, strict=True)):
        if each.learned < 1:
            raise Fault(f"choice {number}, {choice!r}, makes no token of its own after the prompt")
    return made


def encoded_response(item: Item, tokenizer: Tokenizer, first: Sequence[int]) -> list[Encoded]:
    """A free answer after its prompt, one row."""
    prompt, response = item.question, item.answers[0]
    if tokenizer.chat_template:
        messages = item.messages or (("user", prompt), ("assistant", response))
        return [_conversation(messages, tokenizer)]
    if item.messages:
        raise Fault("messages need a chat template, and the tokenizer has none; write prompt and response")
    between = "" if prompt[-1].isspace() or response[0].isspace() else " "
    made = continued(prompt, between + response, tokenizer, first)
    ((start, first, last),) = made.answers
    ids = [*made.input_ids, _end(tokenizer)]
    return [replace(made, input_ids=ids, answers=((start, first, last + 1),))]


def _end(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise Fault("the tokenizer has no eos_token to end an answer; name one in tokenizer_config.json")
    return tokenizer.eos_token_id


def continued(prompt: str, answer: str, tokenizer: Tokenizer, first: Sequence[int] = ()) -> Encoded:
    """Both tokenized together, as a model reads them, and parted after as many tokens as the prompt has.

    White space at the prompt's end goes to the answer, where tokenizers have it.  lm-eval does the same
    (`_encode_pair`), which is what makes its scores and ours equal.
    """
    given = prompt.rstrip()
    alone, whole = tokenizer([given, prompt + answer], add_special_tokens=False, verbose=False)["input_ids"]
    ids, prompt, text = [*first, *alone, *whole[len(alone) :]], len(first) + len(alone), prompt + answer
    start = len(text) - len(answer.lstrip())
    return Encoded(ids, prompt, text=text, before=len(first), answers=((start, prompt, len(ids)),))


def _conversation(messages: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> Encoded:
    """All of a conversation, of which each answer of the assistant's is learned, with the end of its turn.

    An answer is learned where the whole conversation shows it as it was given; where a template strips it (of
    its reasoning, say), it is read only.  What a template puts before an answer is given.
    """
    whole, spans = _shown(messages, tokenizer), []
    for number, (role, content) in enumerate(messages):
        if role == "assistant":
            before, after = (_shown(messages[:end], tokenizer).rstrip() for end in (number, number + 1))
            opened = commonprefix([_shown(messages[:number], tokenizer, add_generation_prompt=True), whole])
            place = whole.find(content.strip(), max(len(opened), len(before)), len(after))
            is_there = whole.startswith(before) and whole.startswith(after) and place >= 0
            spans.append((place, len(after)) if is_there else (0, 0))
    tokens = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = [place for place, _ in tokens["offset_mapping"]]
    learned = [any(start <= place < end for start, end in spans) for place in places]
    if not any(learned):
        raise Fault("the chat template shows no answer of the assistant's as it stands: nothing to learn")
    ids, lost = list(tokens["input_ids"]), spans.count((0, 0))
    if learned[-1] and ids[-1] not in tokenizer.all_special_ids:
        ids, learned = [*ids, _end(tokenizer)], [*learned, True]
    prompt = learned.index(True)
    edges = [place for place in range(prompt + 1, len(learned)) if learned[place] != learned[place - 1]]
    read_only = [*edges, len(learned)] if len(edges) % 2 else edges
    inside = [[n for n, place in enumerate(places) if start <= place < end] for start, end in spans]
    answers = [
        (start, each[0], each[-1] + 1) if each else None
        for (start, _), each in zip(spans, inside, strict=True)
    ]
    if len(ids) > len(places):
        answers[-1] = (*answers[-1][:2], len(ids))
    return Encoded(ids, prompt, tuple(read_only), lost, whole, answers=tuple(answers))


def _shown(messages: Sequence[tuple[str, str]], tokenizer: Tokenizer, **options: Any) -> str:
    spoken = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(spoken, tokenize=False, **options)
    except TemplateError as error:
        raise Fault(f"the chat template refuses these messages: {error}") from error
