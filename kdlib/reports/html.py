"""What all pages share: templates, tables, and pictures.

A page is one file.  Text is escaped, and the policy in templates/page.html.j2 forbids scripts and requests.
"""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter
from pygments.formatters import HtmlFormatter

from kdlib.metrics.names import three_digits, with_interval
from kdlib.runs.files import now, write_text, writing

TEMPLATES = Path(__file__).parent / "templates"
PLOTS = Path(__file__).parent.parent / "plots"  # with heat_map.css
DPI = 130
LONG = 60  # characters in a cell of a table, above which all its cells are broken into lines
LARGEST_SVG = 200_000  # bytes; a picture with more lines than that is smaller as PNG


@dataclass(frozen=True)
class Picture:
    """A figure as files hold it, and its titles: what it says to someone who does not see it."""

    svg: bytes
    png: bytes
    alt: str

    @property
    def source(self) -> str:
        """What `<img src=…>` takes: the drawing where it is small, else the picture."""
        drawn = len(self.svg) <= LARGEST_SVG
        kind, content = ("svg+xml", self.svg) if drawn else ("png", self.png)
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def report_link(name: str, reports: Path) -> str | None:
    """The report of this run as seen from the folder of reports; None where there is none."""
    return f"{quote(name)}/report.html" if (reports / name / "report.html").exists() else None


def page(template: str, **content: Any) -> Markup:
    """The template filled in; text in `content` is escaped, Markup is not."""
    sections: dict[str, str] = {}  # id → title, noted by each part of the page that has something in it
    return Markup(ENVIRONMENT.get_template(template).render(content, sections=sections))


def table(frame: pd.DataFrame) -> Markup:
    """A table that scrolls where it is too wide; its text is escaped, and broken into lines where long."""
    words = "words" if frame.astype(str).map(len).to_numpy().max(initial=0) > LONG else None
    html = frame.to_html(border=0, escape=True, justify="left", classes=words, index_names=False)
    return Markup(f'<div class="wide">{html}</div>')


def write(
    folder: Path,
    text: str,
    pictures: Mapping[str, Picture],
    tables: Mapping[str, pd.DataFrame],
    *,
    index: bool = True,
) -> Path:
    """Write report.html, and its pictures and tables beside it; `index` keeps the tables' row names.

    Raises:
        RunError: the disk refuses.
    """
    with writing(folder):
        for name in ("figures", "tables"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, image in pictures.items():
            (folder / "figures" / f"{name}.png").write_bytes(image.png)
        for name, frame in tables.items():
            write_text(folder / "tables" / f"{name}.csv", frame.to_csv(index=index))
        write_text(folder / "report.html", text)
    return folder / "report.html"


def picture(figure: Figure, name: str = "") -> Picture:
    """A figure as SVG and PNG; `name` stands in where it has no title."""
    _take_literally(figure)
    places = [(axes, place) for axes in figure.axes for place in ("left", "center", "right")]
    titles = [figure.get_suptitle(), *(axes.get_title(place) for axes, place in places)]
    words = [" ".join(title.split()).rstrip(".") for title in (*titles, *map(Text.get_text, figure.texts))]
    alt = ". ".join(dict.fromkeys(filter(None, words))) or name.replace("_", " ")
    return Picture(_saved(figure, "svg", metadata={"Date": None}), _saved(figure, "png"), alt)


def _take_literally(figure: Figure) -> None:
    """Read a `$` as a dollar, as text may come from data; except in tick labels of matplotlib's own."""
    own = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        own.add(axis.get_offset_text())
        if not isinstance(axis.get_major_formatter(), (FixedFormatter, FuncFormatter)):
            own.update(axis.get_ticklabels(which="both"))
    for text in set(figure.findobj(Text)) - own:
        text.set_parse_math(False)


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "kdlib"}):
        figure.savefig(buffer, format=kind, dpi=DPI, **options)
    return buffer.getvalue()


def highlight(style: str) -> Markup:
    """The style sheet of code, which a notebook brings along but its page does not take over."""
    return Markup(HtmlFormatter(style=style).get_style_defs(".highlight"))


ENVIRONMENT = Environment(
    loader=FileSystemLoader([TEMPLATES, PLOTS]),
    extensions=["jinja2.ext.do"],
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals |= {f.__name__: f for f in (highlight, now, table, three_digits, with_interval)}
