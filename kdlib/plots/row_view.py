"""A row that is classified: its text as the student reads it, its class, and what the teacher says of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import escape

WIDEST = 16  # em, of the bar of a certain class
SHOWN = 8  # classes, the likeliest; the others in one line


@dataclass(frozen=True)
class RowView:
    """One row with its class; in a notebook with bars and, printed, in a terminal."""

    text: str
    label: str
    said: Sequence[tuple[str, float]]  # the teacher's probabilities by class, at T = 1

    @property
    def lines(self) -> list[tuple[str, float]]:
        """The likeliest classes first, the rest of many together."""
        ranked = sorted(self.said, key=lambda pair: -pair[1])
        rest = ranked[SHOWN:]
        return [*ranked[:SHOWN], *([(f"{len(rest)} others", sum(p for _, p in rest))] if rest else [])]

    def _repr_html_(self) -> str:
        """Text from data is escaped, and stands in `code`, where no notebook looks for formulas."""
        cell = "padding:.1rem .9rem .1rem 0;border:0;text-align:left;background:none"
        bar = "display:inline-block;height:.8em;background:#8c959f"
        rows = "".join(
            f'<tr><td style="{cell}">{self._marked(name)}</td><td style="{cell}">'
            f'<span style="{bar};width:{WIDEST * p:.2f}em"></span> '
            f"{p:.1%}</td></tr>"
            for name, p in self.lines
        )
        text = f'<code style="white-space:pre-wrap;color:inherit;background:none">{escape(self.text)}</code>'
        return f"<p>{text}</p><p>The teacher says:</p><table>{rows}</table>"

    def _marked(self, name: str) -> str:
        return f"<b>{escape(name)}</b>, its class" if name == self.label else escape(name)

    def __str__(self) -> str:
        said = "\n".join(
            f"  {p:6.1%}  {name}{'  (its class)' if name == self.label else ''}" for name, p in self.lines
        )
        return f"{self.text}\nclass: {self.label}\nthe teacher says:\n{said}"
