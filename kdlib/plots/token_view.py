"""A row as the models see it, token by token, coloured by what is learned from it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import escape
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlib.losses.signals import IGNORED
from kdlib.plots.visible import visible

COLOURS = {"learned": "#c6e7f7", "context": "#eeeeee", "padding": "#ffffff"}
TERMINAL = {"learned": "\x1b[30;46m", "context": "\x1b[2m", "padding": "\x1b[2;9m"}
MEANING = {
    "learned": "predicted, and counted in the loss",
    "context": "read, not learned",
    "padding": "not even read",
}


@dataclass(frozen=True)
class TokenView:
    """The tokens of one row, each learned, context, or padding; in colours in a notebook and, printed, in
    a terminal.
    """

    texts: list[str]
    states: list[str]

    def _repr_html_(self) -> str:
        """Text from data is escaped."""
        spans = "".join(
            f'<span title="{number}: {state}" '
            f'style="background:{COLOURS[state]};color:#1f2328;border-left:1px solid #8c959f">'
            f"{escape(visible(text))}</span>{'<br>' * text.count(chr(10))}"
            for number, (text, state) in enumerate(zip(self.texts, self.states, strict=True))
        )
        legend = "; ".join(
            f'<span style="background:{COLOURS[state]};color:#1f2328">{words}</span>'
            for state, words in self._legend()
        )
        style = "font-family:monospace;line-height:1.7;white-space:pre-wrap"
        return f'<div style="{style}">{spans}</div><p>{legend}</p>'

    def __str__(self) -> str:
        coloured = "".join(
            f"{TERMINAL[state]}{visible(text)}\x1b[0m{chr(10) * text.count(chr(10))}"
            for text, state in zip(self.texts, self.states, strict=True)
        )
        return f"{coloured}\n" + "; ".join(
            f"{TERMINAL[state]}{words}\x1b[0m" for state, words in self._legend()
        )

    def _legend(self) -> list[tuple[str, str]]:
        """[(state, `learned: 127 (predicted, and counted in the loss)`)] of the states that occur."""
        counts = Counter(self.states)
        return [(state, f"{state}: {counts[state]} ({MEANING[state]})") for state in COLOURS if counts[state]]


def token_view(batch: Mapping[str, Tensor], row: int, tokenizer: PreTrainedTokenizerBase) -> TokenView:
    """One row of a collated batch: its tokens as text, and what becomes of each."""
    ids, labels, read = (batch[name][row].tolist() for name in ("input_ids", "labels", "attention_mask"))
    states = [
        "learned" if label != IGNORED else "context" if seen else "padding"
        for label, seen in zip(labels, read, strict=True)
    ]
    return TokenView([tokenizer.decode([token]) for token in ids], states)
