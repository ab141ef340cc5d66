from html.parser import HTMLParser

import nbformat
import pytest
from made_runs import EVIL
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kdlib.reports.notebook_html import ALLOWED, harmless, notebook_html


def shown(tmp_path, *outputs, markdown="") -> str:
    path = tmp_path / "n.ipynb"
    nbformat.write(
        new_notebook(cells=[new_markdown_cell(markdown), new_code_cell("x", outputs=list(outputs))]), path
    )
    return str(notebook_html(path))


def displayed(kind: str, content: object, **metadata) -> nbformat.NotebookNode:
    return new_output("display_data", data={kind: content, "text/plain": "in words"}, metadata=metadata)


class Elements(HTMLParser):
    """Every tag with its attributes, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize(
    "html",
    [
        EVIL,
        '<iframe srcdoc="<script>1</script>"></iframe>',
        '<svg><style><img src=x onerror="1"></style></svg>',
        '<a href="JaVaScript:1">a</a><a href=" javascript:1">b</a><a href="data:text/html,x">c</a>',
        '<base href="http://evil.example"><meta http-equiv=refresh content="0;url=http://evil.example">',
        '<link rel=preconnect href="//evil.example"><link rel=stylesheet href="//evil.example">',
        (
            '<form action="http://evil.example"><input type=image src="http://evil.example/x"><button '
            'formaction="javascript:1">b</button></form>'
        ),
        (
            '<p style="background: u\\72l(http://evil.example); color: red">p</p><p style="position: fixed" '
            'onclick="1" id="summary">q</p>'
        ),
        '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=1&gt;">',
        "<noscript><p title='</noscript><img src=x onerror=1>'>",
        "<style>body { display: none }</style>",
        "<object data=x></object><embed src=x><video src=x poster=x></video><audio src=x></audio>",
        (
            '<img src="data:text/html;base64,AAAA"><img srcset="http://evil.example/x 2x"><td '
            'background="http://evil.example/x">'
        ),
    ],
)
def test_what_could_act_or_fetch_is_taken_out(html):
    kept = harmless(html)
    for tag, attributes in Elements(kept).found:
        assert tag in ALLOWED["tags"]
        assert set(attributes) <= ALLOWED["attributes"] | {"href", "src", "style", "type", "name", "value"}
        assert attributes.get("href", "https://").startswith("https://")
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert not {"url", "position", "\\"} & set(attributes.get("style", "").replace("(", ":").split(":"))
    assert harmless(kept) == kept
    assert "display: none" not in kept


def test_tables_colours_and_pictures_stay(tmp_path):
    table = (
        '<table class="dataframe"><tr style="text-align: right;"><td colspan="2">1 &lt; 2</td></tr></table>'
    )
    picture = '<img src="data:image/png;base64,AAAA" alt="a">'
    token = '<span title="1: learned" style="background:#c6e7f7;color:#1f2328">·the</span>'
    html = harmless(table + picture + token)
    for kept in (
        '<td colspan="2">1 &lt; 2</td>',
        'src="data:image/png;base64,AAAA"',
        'title="1: learned"',
        "background:#c6e7f7",
    ):
        assert kept in html


def test_html_left_open_by_one_output_does_not_swallow_the_next(tmp_path):
    html = shown(
        tmp_path,
        displayed("text/html", "</div></div></details><style>"),
        displayed("text/html", "<p>after</p>"),
        markdown="m",
    )
    assert "<p>after</p>" in html
    assert html.count("<div") == html.count("</div")


def test_markdown_of_an_output_is_shown_and_acts_no_more_than_html(tmp_path):
    html = shown(tmp_path, displayed("text/markdown", f"**strong** {EVIL}"))
    assert "<strong>strong</strong>" in html
    for forbidden in ("<script", "onerror", "onload", 'href="javascript', "http://evil.example"):
        assert forbidden not in html
    assert "\\href{javascript:window.hit=5}{x}" in html  # formulas are text: there is no MathJax


def test_markdown_of_a_cell_cannot_fetch(tmp_path):
    html = shown(
        tmp_path,
        markdown=(
            "![x](http://evil.example/a.png) [good](https://arxiv.org/abs/1503.02531) [bad](javascript:1)"
        ),
    )
    assert "evil.example" not in html
    assert 'href="https://arxiv.org/abs/1503.02531"' in html
    assert "javascript" not in html


def test_what_needs_a_running_kernel_is_shown_in_words(tmp_path):
    widget = new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "a"}})
    html = shown(tmp_path, displayed("application/javascript", "window.hit = 1"), widget)
    assert "window.hit" not in html
    assert "in words" in html
    assert "a widget, which needs a running kernel" in html


def test_a_pictures_size_is_no_way_to_slip_in_an_attribute(tmp_path):
    html = shown(tmp_path, displayed("image/png", "AAAA", **{"image/png": {"width": "1 onerror=alert(1)"}}))
    assert "data:image/png;base64,AAAA" in html
    assert "onerror" not in html


def test_a_long_text_is_cut_in_the_middle_and_says_so(tmp_path):
    html = shown(tmp_path, new_output("stream", name="stdout", text="begin" + "x" * 50_000 + "end"))
    assert "begin" in html
    assert "end" in html
    assert "… 30,008 characters left out …" in html


def test_lines_printed_one_after_another_are_one_text(tmp_path):
    html = shown(tmp_path, *(new_output("stream", name="stdout", text=f"step {i}\n") for i in range(3)))
    assert "step 0\nstep 1\nstep 2" in html
