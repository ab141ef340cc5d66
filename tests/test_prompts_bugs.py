"""Bugs that are planted, the fields of snippets, and harder variants of prompts.

Run: pytest tests/test_prompts_bugs.py
"""

import ast

import pytest

from kdlib.prompts.bugs import planted
from kdlib.prompts.evolve import TABLE, asked, evolved
from kdlib.prompts.prompt import Prompt
from kdlib.prompts.seeds import stdlib
from kdlib.prompts.snippets import python_fields


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("return a < b", "return a <= b"),
        ("return a + b", "return a - b"),
        ("return a and b", "return a or b"),
        ("return not a", "return a"),
        ("return a[0]", "return a[1]"),
        ("a += b", "a -= b"),
        ("return a in b  # é", "return a not in b  # é"),
        ("é = 'é'; return é == b", "é = 'é'; return é != b"),
        ("return '\f' + a[2]", "return '\f' + a[3]"),
    ],
)
def test_the_one_place_for_a_bug_is_taken(line, changed):
    assert planted(f"def f(a, b):\n    {line}\n", "x") == f"def f(a, b):\n    {changed}\n"


@pytest.mark.parametrize(
    "line", ["return f(a)", "return 'a' + b", "return f'{a + 1}'", "return True", "a += 'x'"]
)
def test_what_has_no_place_for_a_bug_gets_none(line):
    assert planted(f"def f(a, b):\n    {line}\n", "x") is None


def test_a_bug_in_the_standard_librarys_functions_is_one_change_that_still_parses():
    found = [(each.fields["code"], planted(each.fields["code"], each.name)) for each in stdlib()]
    with_bug = [(code, bug) for code, bug in found if bug]
    assert len(with_bug) > 0.6 * len(found)
    for code, bug in with_bug:
        before, after = ast.parse(code), ast.parse(bug)
        assert ast.dump(before) != ast.dump(after)
        assert ast.get_docstring(before.body[0]) == ast.get_docstring(after.body[0])
        assert ast.unparse(before.body[0].args) == ast.unparse(after.body[0].args)


def test_the_seed_says_which_bug():
    code = "def f(a, b):\n    return (a + b) * (a - b) < a // 2\n"
    assert planted(code, "x") == planted(code, "x")
    assert len({planted(code, str(n)) for n in range(20)}) > 3


def test_the_fields_of_code_are_its_functions():
    begin = 'import os\n\n\ndef f(a, *, b=1) -> int:\n    """Say it."""\n    # why\n    a += 1'
    fields = python_fields(f"{begin}\n    b += a\n    return b\n")
    assert fields["signature"] == "def f(a, *, b=1) -> int"
    assert fields["description"] == "Say it."
    assert fields["bare"] == "import os\n\ndef f(a, *, b=1) -> int:\n    a += 1\n    b += a\n    return b"
    assert (
        fields["head"] == 'import os\n\n\ndef f(a, *, b=1) -> int:\n    """Say it."""\n    # why\n    a += 1'
    )
    assert python_fields("x = 1") == {"code": "x = 1", "bare": "x = 1"}


def test_a_harder_variant_takes_the_place_of_the_users_words():
    given = Prompt(
        (("system", "s"), ("user", "Sort numbers.")), "function", "function/plain", "seed", "python", "t"
    )
    question = asked(given, 0)
    assert "Sort numbers." in question.messages[0][1]
    assert question == asked(given, 0)
    assert {asked(given, n).template for n in range(40)} == {f"evolve/{name}" for name in TABLE["methods"]}
    harder = evolved(given, " Sort numbers without comparing two of them.\n")
    messages = (("system", "s"), ("user", "Sort numbers without comparing two of them."))
    assert harder == Prompt(messages, "function", "function/plain+evolved", "seed", "python")


@pytest.mark.parametrize(
    ("answer", "finish"),
    [
        ("", "stop"),
        ("Sort many numbers and more", "length"),
        ("I cannot help with that, sorry", "refusal"),
        ("Sort numbers, all of them", "stop"),
        ("Here is the new task: sort numbers", "stop"),
    ],
)
def test_an_answer_that_is_no_variant_gives_none(answer, finish):
    given = Prompt((("user", "Sort numbers, all of them"),), "function")
    assert evolved(given, answer, finish) is None
