"""Each filter with an answer that it takes out and one that it leaves.

Run: pytest tests/test_filters_sift.py
"""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from kdlib.errors import ConfigError, DataError
from kdlib.filters import judge
from kdlib.filters.code_blocks import Block, blocks, code_in, fault
from kdlib.filters.config import Filters
from kdlib.filters.sift import KINDS, check, filters_on, sifted, thrown_out
from kdlib.prompts.prompt import Prompt


@dataclass(frozen=True)
class Answer:
    text: str
    finish: str = "stop"


def block(code, language="python"):
    return f"Here it is:\n\n```{language}\n{code}\n```\n"


def prompt(text="Write a function that adds two numbers.", category="function", language="python", tests=""):
    return Prompt((("user", text),), category, language=language, tests=tests)


PLAIN = prompt(category="explanation", language="")
ADD = block("def add(a, b):\n    return a + b")
LONG = " ".join(f"word{n} is here" for n in range(40))


def reason(asked, answer, **filters):
    said = answer if isinstance(answer, Answer) else Answer(answer)
    return sifted(Filters(**{"overlap": [], **filters}), [(asked, said)])[0]


@pytest.mark.parametrize(
    ("asked", "out", "expected", "left", "filters"),
    [
        (prompt(), Answer("No.", "refusal"), "refusal", ADD, {}),
        (PLAIN, "I'm sorry, but I can't help with that.", "refusal", "I can't say it shorter: it adds.", {}),
        (PLAIN, "As an AI, I cannot write this.", "refusal", "In it, a list cannot do this. I add.", {}),
        (PLAIN, " \n", "empty", "It adds.", {}),
        (prompt(), Answer(ADD, "length"), "cut off", Answer(ADD, "end_turn"), {}),
        (PLAIN, "No.", "too short", "It adds.", {"shortest": 4}),
        (PLAIN, "It adds two numbers.", "too long", "It adds.", {"longest": 10}),
        (prompt(), block("x", "js"), "wrong language: javascript, not python", block("x", "py"), {}),
        (
            PLAIN,
            "这个函数把两个数字相加，然后返回它们的和，仅此而已没有别的",
            "wrong language: cjk letters, not latin",
            "Es addiert zwei Zahlen, ä.",
            {},
        ),
        (prompt(), "You just add them.", "no code", "def add(a, b):\n    return a + b", {}),
        (prompt(), block("def f(:"), "does not parse: line 1: invalid syntax", block("def f(): ..."), {}),
        (prompt(), block("x = '\0'"), "does not parse: source code string", block("'\\d'"), {}),
        (
            prompt(language="javascript"),
            block("f = x => {", "js"),
            "does not parse: line",
            block("f = x => {}", "js"),
            {"parses": ["javascript"]},
        ),
    ],
)
def test_a_filter_takes_one_and_leaves_one(asked, out, expected, left, filters):
    assert (reason(asked, out, **filters) or "").startswith(expected)
    assert reason(asked, left, **filters) is None


def test_a_filter_that_is_off_takes_nothing():
    off = {"language": False, "parses": [], "near_duplicates": None}
    assert reason(prompt(), block("f(", "python"), **off) is None
    assert reason(prompt(), block("def f(:\n```\n\n```js\nx"), **off) is None
    assert reason(prompt(language="go"), block("((", "go")) is None


def test_a_session_of_python_is_no_code_and_a_shells_block_no_other_language():
    answer = f"{block('pip install x', 'bash')}{ADD}{block('>>> add(1, 2)')}"
    assert reason(prompt(), answer) is None
    assert code_in(answer, "python") == ["def add(a, b):\n    return a + b\n"]


def test_a_prose_is_in_the_script_of_the_prompts_own_prose():
    asked = "この関数が何をするのかを、順を追ってわかりやすく日本語で説明してください。"
    japanese = prompt(f"{asked}\n{ADD}", "explanation", "")
    chinese = "这个函数接受两个参数，并且返回它们的和；没有其他任何作用。"
    assert reason(japanese, chinese) is None
    assert reason(japanese, LONG) == "wrong language: latin letters, not cjk"
    assert reason(japanese, f"{chinese}\n{ADD}") is None


def test_blocks_are_read_with_their_languages():
    text = "1. so\n   ```Python3 title=x\n   a = 1\n   ```\n~~~\nb\n~~~\n"
    text += "````md\n```js\n```\n````\n```c++\nint x;"
    expected = [("python", "a = 1\n"), ("", "b\n"), ("md", "```js\n```\n"), ("c++", "int x;")]
    assert blocks(text) == [Block(*each) for each in expected]


def test_near_duplicates_go_but_for_the_first_and_only_within_a_category():
    other = LONG.replace("word7 ", "word8 ")
    far = " ".join(f"other{n} was there" for n in range(40))
    asked = [PLAIN, PLAIN, PLAIN, prompt(category="translation", language="")]
    answered = [(each, Answer(text)) for each, text in zip(asked, [LONG, other, far, LONG], strict=True)]
    found = sifted(Filters(overlap=[]), answered)
    assert found == [None, "near duplicate: of answer 0", None, None]
    assert sifted(Filters(overlap=[], near_duplicates=0.99), answered) == [None] * 4


def test_a_duplicate_of_what_was_thrown_out_is_kept():
    answered = [(PLAIN, Answer(LONG, "length")), (PLAIN, Answer(LONG))]
    assert sifted(Filters(overlap=[]), answered) == ["cut off", None]


def test_programs_are_run_with_their_tests_only_where_that_is_asked_for():
    tested = prompt(tests="assert add(1, 2) == 3")
    answered = [
        (tested, Answer(ADD)),
        (tested, Answer(ADD.replace("+", "-"))),
        (prompt(), Answer(block("1/0"))),
    ]
    programs = []

    def run(program):
        programs.append(program)
        return SimpleNamespace(passed="+" in program, name="assertion")

    unasked = Filters(overlap=[], near_duplicates=None)
    assert sifted(unasked, answered, run=run) == [None] * 3
    assert not programs
    found = sifted(Filters(overlap=[], near_duplicates=None, tests=True), answered, run=run)
    assert found == [None, "tests fail: assertion", None]
    assert sorted(programs)[0] == "def add(a, b):\n    return a + b\n\n\nassert add(1, 2) == 3\n"


def test_a_program_is_run_in_its_fence():
    tested = prompt(tests="import os\nassert add(1, 2) == 3\nassert 'PATH' not in os.environ")
    wrong = block("def add(a, b):\n    return a - b\n\n\nadd(1)")
    filters = Filters(overlap=[], near_duplicates=None, tests=True)
    found = sifted(filters, [(tested, Answer(ADD)), (tested, Answer(wrong))])
    assert found == [None, "tests fail: exception: TypeError"]


def test_the_judges_score_decides_where_it_was_asked():
    answered = [(PLAIN, Answer(f"It adds {n}.")) for n in range(3)]
    filters = Filters(overlap=[], lowest_score=5)
    assert sifted(filters, answered) == [None] * 3
    found = sifted(filters, answered, scores=[5.0, 4.5, None])
    assert found == [None, "low score: 4.5 of 10", "low score: the judge gave none"]


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("Good. [[8]]", 8.0),
        ("[[3]] at first, [[ 7.5/10 ]]", 7.5),
        ("8", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("", None),
    ],
)
def test_a_score_is_read_or_there_is_none(said, score):
    assert judge.score(said) == score


def test_the_judge_is_given_task_and_answer_as_they_are():
    asked = judge.asked(prompt("Say {x}"), "It is {y}")
    assert "Say {x}" in asked.messages[0][1]
    assert "It is {y}" in asked.messages[0][1]
    assert (
        judge.score(asked.messages[0][1]) == 5.0
    )  # the form alone: an answer's own marks come before the judge's


def test_what_was_thrown_out_is_counted_with_examples_of_each_kind():
    rows = [{"reason": "does not parse: line 1", "response": str(n)} for n in range(5)]
    rows.append({"reason": "repeated prompt: number 3", "response": "x"})
    table = {row["reason"]: row for row in thrown_out(rows)}
    assert [*table] == [*KINDS, "repeated prompt"]
    assert table["does not parse"]["count"] == 5
    assert [row["response"] for row in table["does not parse"]["examples"]] == ["0", "1", "2"]
    assert table["empty"] == {"reason": "empty", "count": 0, "examples": []}


def test_every_filter_is_among_the_kinds_that_are_counted():
    every = Filters(longest=9, tests=True)
    assert tuple(kind for kind, _ in filters_on(every, [], print)) == KINDS


def test_what_would_stop_the_filters_is_said_before_anything_is_paid(monkeypatch):
    check(Filters())
    with pytest.raises(ConfigError, match="no grammar for 'javascrip'; did you mean 'javascript'"):
        check(Filters(parses=["javascrip"]))
    with pytest.raises(DataError, match=r"no such file"):
        check(Filters(overlap=["mpbp"]))
    ran = []
    check(Filters(tests=True), run=ran.append)
    assert ran == [""]
    monkeypatch.setitem(__import__("sys").modules, "tree_sitter_go", None)
    with pytest.raises(ConfigError, match=r"pip install 'kdlib\[treesitter\]'"):
        check(Filters(parses=["go"]))
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(ConfigError, match=r"pip install 'kdlib\[generate\]'"):
        check(Filters())


def test_what_cannot_be_parsed_for_its_depth_is_a_fault_and_no_crash():
    assert fault("python", "(" * 5000 + ")" * 5000)
