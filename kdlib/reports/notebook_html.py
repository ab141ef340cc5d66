"""An executed notebook as the inside of a page: prose and results, code folded away.

What a cell displays may come out of data, so of the HTML only what can neither act nor fetch is kept; and
a notebook's outputs together have a limit, as the page is to be sent on.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import nbformat
from bleach.css_sanitizer import CSSSanitizer
from bleach.html5lib_shim import Filter
from bleach.sanitizer import Cleaner
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbformat import NotebookNode
from nbformat.v4 import new_output

from kdlib.config.sections import read_beside
from kdlib.reports.html import TEMPLATES

LARGEST = 600_000  # characters of all outputs of a notebook
LONGEST = 20_000  # characters of one text
ACTIVE = ("application/javascript", "application/vnd.jupyter.widget-view+json")


ALLOWED = {name: set(words.split()) for name, words in read_beside(__file__).items()}
"""Tags, attributes and styles that are kept, and tags dropped with all that is in them."""


def notebook_html(path: Path) -> Markup:
    """The notebook with all it shows that is harmless; what is left out for its size is said in its place."""
    notebook = nbformat.read(path, as_version=4)
    left = LARGEST
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, left = _within(cell.outputs, left, path.name)
    return Markup(_exporter().from_notebook_node(notebook)[0])


@cache
def _exporter() -> HTMLExporter:
    """nbconvert's, with each cell cleaned on its own, so that none stays open."""
    exporter = HTMLExporter(
        template_name="notebook",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_anchor_links=True,
        sanitize_html=True,
    )
    exporter.register_filter("clean_html", harmless)
    exporter.register_preprocessor(CoalesceStreamsPreprocessor(), enabled=True)  # lines become one text
    return exporter


def harmless(html: str) -> str:
    """HTML that can neither act nor fetch: no script, frame, id, outside picture, foreign style."""
    # the dropped ones are allowed at first, so that the filter sees where they begin and end
    cleaner = Cleaner(
        tags=ALLOWED["tags"] | ALLOWED["dropped"],
        attributes=_is_allowed,
        protocols={"http", "https", "mailto", "data"},
        strip=True,
        css_sanitizer=CSSSanitizer(allowed_css_properties=ALLOWED["styles"]),
        filters=[_WithoutDropped],
    )
    return cleaner.clean(html)


class _WithoutDropped(Filter):
    """Takes out some elements together with all that is in them."""

    def __iter__(self) -> Iterator[dict]:
        depth = 0
        for token in super().__iter__():
            dropped = token.get("name") in ALLOWED["dropped"]
            depth += {"StartTag": 1, "EndTag": -1}.get(token["type"], 0) if dropped else 0
            if not depth and not dropped:
                yield token


def _is_allowed(tag: str, name: str, value: str) -> bool:
    if (tag, name) == ("img", "src"):
        return bool(re.match(r"data:image/(png|jpeg|gif|webp|svg\+xml);base64,", value))
    if (tag, name) == ("a", "href"):
        return bool(re.match(r"(https?://|mailto:)", value, re.IGNORECASE))
    if name == "style":
        return not re.search(r"url|image|\\", value, re.IGNORECASE)  # nothing that fetches
    if tag == "input":
        return name in ("name", "value", "checked") or (name == "type" and value in ("radio", "checkbox"))
    return name in ALLOWED["attributes"]


def _within(outputs: list[NotebookNode], left: int, name: str) -> tuple[list[NotebookNode], int]:
    """The outputs of a cell, as far as they find room in what is left of the notebook's."""
    kept, missing = [], 0
    for output in map(_shortened, outputs):
        size = len(json.dumps(output))
        if size > left:
            missing += 1
        else:
            kept, left = [*kept, output], left - size
    if missing:
        what = f"{missing} output{'s are' if missing > 1 else ' is'} left out here for the size"
        kept.append(new_output("stream", name="stderr", text=f"{what}; notebooks/{name} has all"))
    return kept, left


def _shortened(output: NotebookNode) -> NotebookNode:
    if output.output_type == "stream":
        output.text = _cut(output.text)
    elif output.output_type == "error":
        output.traceback = [_cut("\n".join(output.traceback))]
    else:
        output.data = {kind: content for kind, content in output.data.items() if kind not in ACTIVE}
        text = output.data.get("text/plain", "a widget, which needs a running kernel")
        output.data["text/plain"], output.metadata = _cut(text), NotebookNode()
    return output


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"
