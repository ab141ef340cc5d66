"""Tokens of a prompt and what answers it: what of a row is given, what is learned, what ends an answer."""

import json
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from os.path import commonprefix
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.tokens.templates import MARKED, Asked, Refused, Rendered, rendered, template_of, written
from kdlib.tokens.vocabulary import ids_of, special_ids

Span = tuple[int, int] | None  # from which character to which; (0, 0): not shown; None: not to be learned
REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing, by its names in transformers
INSTEAD = {"developer": "system", "function": "tool"}  # roles, where a template does not know them
LINKS = {"tool": ("name", "tool_call_id")}  # keys, by role, that say what belongs together: not all read them
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


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation, hashable: what a chat template reads, which of the assistant's turns are learned."""

    messages: str  # JSON: [{"role", "content", …}, …]
    learned: tuple[bool, ...] = (True,)
    values: str = "{}"  # JSON of what the template reads beside: tools, and others by their names


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


def conversations(
    every: Sequence[Talk], tokenizer: Tokenizer, template: str | None = None
) -> list[list[Encoded] | Fault]:
    """All of each conversation, of which each answer of the assistant's is learned, with the end of its turn.

    Where the template marks what the assistant says ({% generation %}), that is learned.  Else an answer is
    where the whole conversation shows it as it was given; where a template strips it (of its reasoning, say),
    it is read only.  What a template puts before an answer is given.

    Args:
        template: its name, where the tokenizer has several.
    """
    asked = list(attempted(partial(_asked, tokenizer=tokenizer, name=template), every))
    found = _rendered(asked, tokenizer)
    shown = list(attempted(partial(_answers_in, end=tokenizer.eos_token or ""), every, asked, found))
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


def _asked(talk: Talk, tokenizer: Tokenizer, name: str | None) -> Asked:
    """What is to be rendered: all of a conversation and, where the template marks no answer, prefixes."""
    values = json.loads(talk.values)
    template = template_of(tokenizer, name=name, tools=values.get("tools"))
    messages = _readable(json.loads(talk.messages), values, template)
    cuts, marks = [(len(messages), False)], MARKED.search(template) is not None
    for number in () if marks else _answers(messages):
        cuts += [(number, False), (number + 1, False), (number, True)]
    return Asked(template, messages, cuts, values, marks)


def _answers(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The numbers of the assistant's messages."""
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _rendered(asked: Sequence[Asked | Fault], tokenizer: Tokenizer) -> list[Rendered | Fault]:
    """Each as its template has it; where that takes the arguments of calls as text alone, they are text."""
    fit = {number: each for number, each in enumerate(asked) if isinstance(each, Asked)}
    made: list[Any] = [*asked]
    for number, each in zip(fit, rendered(tokenizer, [*fit.values()]), strict=True):
        made[number] = each
    again = {
        n: replace(fit[n], messages=_spelt(fit[n].messages)) for n in fit if isinstance(made[n], Refused)
    }
    again = {n: each for n, each in again.items() if each != fit[n]}
    for number, each in zip(again, rendered(tokenizer, [*again.values()]), strict=True):
        made[number] = made[number] if isinstance(each, Refused) else each
    what = "the chat template refuses these messages"
    return [Fault(f"{what}: {each}") if isinstance(each, Refused) else each for each in made]


def _spelt(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of their calls as JSON."""
    made: list[dict[str, Any]] = json.loads(json.dumps([*messages]))
    for call in chain.from_iterable(message.get("tool_calls", ()) for message in made):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return made


def _answers_in(
    talk: Talk, asked: Asked | Fault, found: Rendered | Fault, end: str
) -> tuple[str, list[Span]]:
    """The conversation as the template shows it, and where each answer stands in it."""
    if isinstance(asked, Fault) or isinstance(found, Fault):
        raise asked if isinstance(asked, Fault) else found
    (whole, *parts), numbers, places = found.texts, _answers(asked.messages), found.spans
    if asked.marks and len(places) != len(numbers):
        raise Fault(
            f"the chat template marks {len(places)} parts as the assistant's, who has {len(numbers)} turns; "
            "needed is a mark for each ({% generation %})"
        )
    if not asked.marks:
        texts = zip(numbers, *(parts[n::3] for n in range(3)), strict=True)
        places = [_place(asked.messages[number], end, whole, *each) for number, *each in texts]
    for number, message in enumerate(asked.messages):
        if number not in numbers and not _is_in(message.get("content", "").strip(), whole):
            raise Fault(f"message {number}, the {message['role']}'s, is not in what the chat template makes")
    spans = zip(places, talk.learned, strict=True)
    return whole, [((a, b) if a < b else (0, 0)) if is_learned else None for (a, b), is_learned in spans]


def _place(
    message: Mapping[str, Any], end: str, whole: str, before: str, after: str, begun: str
) -> tuple[int, int]:
    """Where an answer stands in the whole conversation; (0, 0) where it is shown otherwise.

    Args:
        end: of a text, which some templates write after the last message alone.
        before, after: the conversation up to the answer, without and with it.
        begun: up to it, with the beginning of an answer.
    """
    before, after = (
        text if whole.startswith(text) else text.removesuffix(end).rstrip()
        for text in (before.rstrip(), after.rstrip())
    )
    first = max(len(commonprefix([begun, whole])), len(before))
    place = whole.find((message.get("content") or "").strip(), first, len(after))
    if not whole.startswith(before) or not whole.startswith(after) or place < 0:
        return 0, 0
    said = [message[name].strip() for name in REASONING if isinstance(message.get(name), str)]
    said += [call["function"]["name"] for call in message.get("tool_calls", ())]
    is_before = any(text and text in whole[first:place] for text in said)  # reasoning, or calls
    return first if is_before else place, len(after)


def _readable(messages: list[dict], values: Mapping[str, Any], template: str) -> list[dict]:
    """The messages with roles that the template knows; a Fault where it would pass over what stands there."""
    words = _words(template)
    there = dict.fromkeys(values, "a column")
    for number, message in enumerate(messages):
        if message["role"] not in words:
            message["role"] = INSTEAD.get(message["role"], message["role"])
        links = ("role", "content", *LINKS.get(message["role"], ()))
        there |= {key: f"message {number}" for key in message if key not in links}
    for key, where in there.items():
        if not words & ({key, *REASONING[:2]} if key in REASONING else {key}):
            raise Fault(
                f"{where} has {key!r}, which the chat template does not read; take a tokenizer whose "
                f"template does, or leave it out: data.ignore: [{key}]"
            )
    return messages


@cache
def _words(template: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", template))


def _is_in(content: str, whole: str) -> bool:
    """Whether a text is shown, as it is or as JSON."""
    return content in whole or any(json.dumps(content, ensure_ascii=a)[1:-1] in whole for a in (True, False))


def _conversation(
    whole: str,
    spans: Sequence[Span],
    ids: list[int],
    offsets: Sequence[tuple[int, int]],
    *,
    end: int | None,
    special: Collection[int],
) -> Encoded:
    """One of them, by where its answers stand and its tokens begin."""
    places, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    there = [span or (0, 0) for span in spans]
    inside = [np.flatnonzero((start < ends) & (places < last)).tolist() for start, last in there]
    learned = np.zeros(len(ids), bool)
    learned[list(chain.from_iterable(inside))] = True
    if not learned.any():
        raise Fault("the chat template shows no answer of the assistant's as it stands: nothing to learn")
    answers = [
        (start, each[0], each[-1] + 1) if each else None
        for (start, _), each in zip(there, inside, strict=True)
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


def roles(ours: Tokenizer, theirs: Tokenizer) -> dict[int, int]:
    """{a special token of ours: theirs in the same role}: the end of a turn, a text's beginning, and its end.

    A token that has several roles is in the last of them.
    """
    named = [[getattr(each, f"{name}_token_id") for each in (ours, theirs)] for name in ("bos", "eos")]
    both = [[turn_end(ours), turn_end(theirs)], *named]
    return {one: other for one, other in both if None not in (one, other)}


def turn_end(tokenizer: Tokenizer) -> int | None:
    """The special token with which its chat template ends an answer; None where there is none."""
    known = tokenizer.chat_template
    if not known or (isinstance(known, Mapping) and "default" not in known):
        return None
    talk = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": "answered"}]
    try:
        after = written(tokenizer, talk).rpartition("answered")[2]
    except Refused:
        return None
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next(filter(special_ids(tokenizer).__contains__, ids), None)
