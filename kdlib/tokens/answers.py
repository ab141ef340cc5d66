"""Tokens of a prompt and what answers it: of a row, what is given and what is learned."""

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from os.path import commonprefix
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.tokens.vocabulary import ids_of

Messages = Sequence[tuple[str, str]]  # role, content
NO_END = "the tokenizer has no eos_token to end an answer; name one in tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row's tokens: the first `prompt_tokens` are given, and so are the spans `read_only`."""

    input_ids: Sequence[int]  # an array: four bytes a token
    prompt_tokens: int
    read_only: tuple[int, ...] = ()  # start, end, start, end, …
    turns_read_only: int = 0  # the assistant's, that the template shows otherwise once the talk has gone on
    text: str = ""  # what its tokens are made of
    before: int = 0  # tokens that are none of the text's: its beginning; what is left over is its end
    # of each answer the character at which it begins, its first token, and the one after its last
    answers: tuple[tuple[int, int, int] | None, ...] = ()

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return len(self.input_ids) - self.prompt_tokens - sum(self.read_only[1::2]) + sum(self.read_only[::2])


class Fault(Exception):
    """What is wrong with one row, in words that follow `row 3 of train: `."""


def attempted(make: Callable[..., Any], *lists: Iterable) -> Iterator[Any]:
    """As `map(make, *lists)`, with a `Fault` in the place of what was to be made where there is one."""
    for each in zip(*lists, strict=True):
        try:
            yield make(*each)
        except Fault as fault:
            yield fault


def continued(
    both: Sequence[tuple[str, str]],
    tokenizer: Tokenizer,
    first: Sequence[int] = (),
    last: Sequence[int] = (),
) -> list[Encoded]:
    """Prompt and answer tokenized together, as a model reads them, parted after the prompt's count of tokens.

    White space at the prompt's end goes to the answer, where tokenizers have it.  lm-eval does the same
    (`_encode_pair`), which is what makes its scores and ours equal.

    Args:
        first, last: what begins every row, and what ends it.
    """
    places = {
        given: number for number, given in enumerate(dict.fromkeys(prompt.rstrip() for prompt, _ in both))
    }
    texts = [prompt + answer for prompt, answer in both]
    tokens, made = ids_of(tokenizer, [*places, *texts]), []
    for (given, answer), text, whole in zip(both, texts, tokens[len(places) :], strict=True):
        alone = tokens[places[given.rstrip()]]
        ids, prompt = array("i", [*first, *alone, *whole[len(alone) :], *last]), len(first) + len(alone)
        start = len(text) - len(answer.lstrip())
        made.append(Encoded(ids, prompt, text=text, before=len(first), answers=((start, prompt, len(ids)),)))
    return made


def conversations(every: Sequence[Messages], tokenizer: Tokenizer) -> list[list[Encoded] | Fault]:
    """All of each conversation, of which each answer of the assistant's is learned, with the end of its turn.

    An answer is learned where the whole conversation shows it as it was given; where a template strips it (of
    its reasoning, say), it is read only.  What a template puts before an answer is given.
    """
    shown = list(attempted(partial(_answers_in, tokenizer=tokenizer), every))
    texts = [each[0] for each in shown if not isinstance(each, Fault)]
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    tokens = tokenizer(texts, return_offsets_mapping=True, **options) if texts else {}
    read = zip(tokens.get("input_ids", ()), tokens.get("offset_mapping", ()), strict=True)
    ends, special = tokenizer.eos_token_id, frozenset(tokenizer.all_special_ids)

    def row(each: Any) -> list[Encoded]:
        if isinstance(each, Fault):
            raise each
        return [_conversation(*each, *next(read), end=ends, special=special)]

    return list(attempted(row, shown))


def _answers_in(messages: Messages, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the template shows it, and where each answer stands in it; (0, 0): nowhere."""
    whole, spans = _shown(messages, tokenizer), []
    for number, (role, content) in enumerate(messages):
        if role == "assistant":
            is_last = number + 1 == len(messages)
            before = _shown(messages[:number], tokenizer).rstrip()
            after = (whole if is_last else _shown(messages[: number + 1], tokenizer)).rstrip()
            opened = commonprefix([_shown(messages[:number], tokenizer, add_generation_prompt=True), whole])
            place = whole.find(content.strip(), max(len(opened), len(before)), len(after))
            is_there = whole.startswith(before) and whole.startswith(after) and place >= 0
            spans.append((place, len(after)) if is_there else (0, 0))
    return whole, spans


def _conversation(
    whole: str,
    spans: Sequence[tuple[int, int]],
    ids: list[int],
    offsets: Sequence[tuple[int, int]],
    *,
    end: int | None,
    special: Collection[int],
) -> Encoded:
    """One of them, by where its answers stand and its tokens begin."""
    places = np.array(offsets, np.int64).reshape(-1, 2)[:, 0]
    inside = [np.flatnonzero((start <= places) & (places < last)).tolist() for start, last in spans]
    learned = np.zeros(len(ids), bool)
    learned[list(chain.from_iterable(inside))] = True
    if not learned.any():
        raise Fault("the chat template shows no answer of the assistant's as it stands: nothing to learn")
    answers = [
        (start, each[0], each[-1] + 1) if each else None
        for (start, _), each in zip(spans, inside, strict=True)
    ]
    if learned[-1] and ids[-1] not in special:
        if end is None:
            raise Fault(NO_END)
        ids, learned = [*ids, end], np.append(learned, True)
        answers[-1] = (*answers[-1][:2], len(ids))
    prompt = int(learned.argmax())
    edges = (np.flatnonzero(np.diff(learned[prompt:])) + prompt + 1).tolist()
    read_only = [*edges, len(ids)] if len(edges) % 2 else edges
    lost = spans.count((0, 0))
    return Encoded(array("i", ids), prompt, tuple(read_only), lost, whole, answers=tuple(answers))


def _shown(messages: Sequence[tuple[str, str]], tokenizer: Tokenizer, **options: Any) -> str:
    spoken = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(spoken, tokenize=False, **options)
    except TemplateError as error:
        raise Fault(f"the chat template refuses these messages: {error}") from error
