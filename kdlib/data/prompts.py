"""Items as token ids: what is given first, what is learned after it.

A multiple choice is written as lm-eval writes it, `Question: …\\nAnswer:` and ` <choice>`, without a chat
template and without an end of text after the choice, so that what is trained is what is scored.  A free
answer is written in the tokenizer's chat template where it has one, and ends as the model is to end it: with
the template's own end of turn, or with EOS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from kdlib.data.qa_rows import Fault, Item


@dataclass(frozen=True)
class Encoded:
    """A row's tokens: the first `prompt_tokens` are given, and so are the spans [start, end, start, end,
    …] of `read_only`.
    """

    input_ids: list[int]
    prompt_tokens: int
    read_only: tuple[int, ...] = ()
    # the assistant's, that the template shows otherwise once the conversation has gone on
    turns_read_only: int = 0

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return len(self.input_ids) - self.prompt_tokens - sum(self.read_only[1::2]) + sum(self.read_only[::2])


def asked(question: str) -> str:
    """A multiple choice's prompt; its choices follow after a space."""
    return f"Question: {question}\nAnswer:"


def encoded_choices(item: Item, tokenizer: PreTrainedTokenizerBase, first: Sequence[int]) -> list[Encoded]:
    """The prompt with each choice in turn; `first` begins every row ([BOS], or nothing).

    Raises:
        Fault: a choice has no token of its own.
    """
    made = [continued(asked(item.question), f" {choice}", tokenizer, first) for choice in item.answers]
    for number, each in enumerate(made):
        if each.learned < 1:
            raise Fault(
                f"choice {number}, {item.answers[number]!r}, makes no token of its own after the prompt"
            )
    return made


def encoded_response(item: Item, tokenizer: PreTrainedTokenizerBase, first: Sequence[int]) -> Encoded:
    """A free answer after its prompt.

    Raises:
        Fault: the chat template refuses the messages, or there is none.
    """
    if tokenizer.chat_template:
        return _conversation(
            item.messages or (("user", item.question), ("assistant", item.answers[0])), tokenizer
        )
    if item.messages:
        raise Fault(
            "messages need a chat template, and the tokenizer has none; write them as prompt and response"
        )
    prompt, response = item.question, item.answers[0]
    between = "" if prompt[-1].isspace() or response[0].isspace() else " "
    made = continued(prompt, between + response, tokenizer, first)
    return Encoded([*made.input_ids, tokenizer.eos_token_id], made.prompt_tokens)


def continued(
    prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, first: Sequence[int] = ()
) -> Encoded:
    """Both tokenized together, as a model reads them, and parted after as many tokens as the prompt alone
    has.

    White space at the prompt's end goes to the answer, where tokenizers have it.  lm-eval does the same
    (`_encode_pair`), which is what makes its scores and ours equal.
    """
    given = prompt.rstrip()
    alone, whole = tokenizer([given, prompt + answer], add_special_tokens=False, verbose=False)["input_ids"]
    return Encoded([*first, *alone, *whole[len(alone) :]], len(first) + len(alone))


def _conversation(messages: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """All of a conversation, of which each answer of the assistant's is learned, with the end of its turn.

    An answer is learned where the whole conversation shows it as it stood when it was given: templates that
    strip an earlier turn (of its reasoning, say) leave no such place, and the turn is read only.  What a
    template puts before an answer is given.
    """
    whole = _shown(messages, tokenizer)
    spans, lost = [], 0
    for number, (role, content) in enumerate(messages):
        if role == "assistant":
            before, after = (_shown(messages[:end], tokenizer).rstrip() for end in (number, number + 1))
            opened = commonprefix([_shown(messages[:number], tokenizer, add_generation_prompt=True), whole])
            place = whole.find(content.strip(), max(len(opened), len(before)), len(after))
            is_there = whole.startswith(before) and whole.startswith(after) and place >= 0
            spans, lost = [*spans, (place, len(after))] if is_there else spans, lost + (not is_there)
    tokens = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learned = [any(start <= place < end for start, end in spans) for place, _ in tokens["offset_mapping"]]
    if not any(learned):
        raise Fault(
            "the chat template does not show the assistant's answer as it stands, so there is nothing to "
            "learn"
        )
    ids = list(tokens["input_ids"])
    if learned[-1] and ids[-1] not in tokenizer.all_special_ids:
        ids, learned = [*ids, tokenizer.eos_token_id], [*learned, True]
    prompt = learned.index(True)
    edges = [place for place in range(prompt + 1, len(learned)) if learned[place] != learned[place - 1]]
    read_only = [*edges, len(learned)] if len(edges) % 2 else edges
    return Encoded(ids, prompt, tuple(read_only), lost)


def _shown(messages: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    spoken = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(spoken, tokenize=False, **options)
    except TemplateError as error:
        raise Fault(f"the chat template refuses these messages: {error}") from error
