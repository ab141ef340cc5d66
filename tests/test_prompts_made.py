"""Prompts of templates and seeds: eight categories, shares, the same each time, or refused before it is paid.

Run: pytest tests/test_prompts_made.py
"""

import ast
import json
import subprocess
import sys
from collections import Counter

import pytest

from kdlib.config.run import parse
from kdlib.errors import ConfigError, DataError
from kdlib.generation.config import GenerationConfig
from kdlib.prompts.config import CATEGORIES, Prompts
from kdlib.prompts.made import made
from kdlib.prompts.templates import templates

CODE = '''def total(numbers):
    """The sum of the numbers that are above zero."""
    found = 0
    for number in numbers:
        if number > 0:
            found += number
    return found  # zero where there are none
'''
ROW = {"code": CODE, "tests": "assert total([1, -1, 2]) == 3"}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "mine.jsonl"

    def write(*rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def config(**prompts):
    raw = {"teacher": {"endpoint": {"model": "m"}}, "prompts": prompts}
    return parse(raw, kind=GenerationConfig).prompts


def text_of(prompt):
    return prompt.messages[-1][1]


@pytest.fixture(scope="module")
def built_in():
    return made(Prompts(seeds="stdlib", count=160), 0)


def test_the_standard_library_alone_makes_as_many_of_each_category_and_no_two_alike(built_in):
    assert Counter(prompt.category for prompt in built_in) == dict.fromkeys(CATEGORIES, 20)
    assert len({prompt.messages for prompt in built_in}) == 160
    assert {len({p.template for p in built_in if p.category == c}) for c in CATEGORIES} == {3}
    assert all(prompt.seed and prompt.template.startswith(prompt.category) for prompt in built_in)


def test_a_part_of_the_prompts_is_a_fair_part(built_in):
    assert Counter(prompt.category for prompt in built_in[:80]) == dict.fromkeys(CATEGORIES, 10)


@pytest.mark.slow
def test_another_process_and_another_hash_seed_make_the_same_prompts(built_in):
    code = (
        "from kdlib.prompts.made import made; from kdlib.prompts.config import Prompts\n"
        "print([p.messages for p in made(Prompts(seeds='stdlib', count=160), 0)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == [prompt.messages for prompt in built_in]


def test_the_seed_decides_alone(rows):
    asked = Prompts(seeds=rows(ROW, {"code": CODE.replace("total", "summed")}), count=12)
    assert made(asked, 3) == made(asked, 3)
    assert made(asked, 3) != made(asked, 4)


def test_shares_are_kept_to_the_last_prompt(rows):
    asked = config(seeds="stdlib", count=10, categories={"bug_fix": 2, "explanation": 1})
    assert Counter(prompt.category for prompt in made(asked, 0)) == {"bug_fix": 7, "explanation": 3}


def test_a_seed_of_code_serves_all_categories_with_its_tests_where_the_answer_is_its_code(rows):
    prompts = made(Prompts(seeds=rows(ROW), count=16), 0)
    assert {prompt.category for prompt in prompts} == set(CATEGORIES)
    of = {prompt.category: prompt for prompt in prompts}
    assert of["bug_fix"].tests == of["function"].tests == ROW["tests"]
    assert of["unit_tests"].tests == of["explanation"].tests == ""
    assert of["explanation"].language == ""
    assert of["function"].language == "python"
    targets = {
        p.language for p in prompts if p.category == "translation" and p.template != "translation/style"
    }
    assert targets <= {"javascript", "typescript", "java", "go", "rust", "c++"}
    assert "The sum of the numbers" not in text_of(of["docstring"])
    assert "above zero" in text_of(of["function"])
    assert "return found" not in text_of(of["completion"])


def test_a_translation_is_never_into_its_own_language(rows):
    row = {"language": "javascript", "code": "f = x => x", "bare": "f = x => x"}
    asked = Prompts(
        seeds=rows(*({**row, "n": str(n)} for n in range(40))), count=20, categories=["translation"]
    )
    with pytest.raises(DataError, match="can be made of 40 seeds"):
        made(asked, 0)  # all of them are the same code
    asked = Prompts(
        seeds=rows(*({**row, "code": f"f = x => {n}", "bare": f"f = x => {n}"} for n in range(40))),
        count=60,
        categories=["translation"],
    )
    languages = {p.language for p in made(asked, 0) if p.template != "translation/style"}
    assert "javascript" not in languages
    assert len(languages) == 5


def test_a_problem_without_code_serves_the_categories_that_it_can(rows):
    problem = rows({"description": "Add two numbers.", "tests": "assert add(1, 2) == 3"})
    [prompt] = made(config(seeds=problem, count=1, categories=["function"]), 0)
    assert "Add two numbers." in text_of(prompt)
    assert prompt.tests
    with pytest.raises(ConfigError) as caught:
        made(config(seeds=problem, count=2, categories=["function", "bug_fix"]), 0)
    assert "template bug_fix/wrong: no field 'buggy'" in str(caught.value)
    assert "the seeds have description, language, tests" in str(caught.value)


def test_a_seed_that_no_template_can_use_is_refused(rows):
    seeds = rows(ROW, {"descripton": "Add two numbers."})
    with pytest.raises(DataError) as caught:
        made(config(seeds=seeds, count=1), 0)
    assert "1 seeds fit no template" in str(caught.value)
    assert "mine.jsonl:2" in str(caught.value)


def test_seeds_are_read_from_a_folder_of_python_and_rows(tmp_path):
    (tmp_path / "b.py").write_text(f"import os\n\n{CODE}\nclass A:\n    def method(self): pass\n")
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    names = {prompt.seed for prompt in made(Prompts(seeds=str(tmp_path), count=16), 0)}
    assert names == {"b.py:total", "a.jsonl:1"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"code": "def f("}', "a.jsonl, line 1:"),
        ("a.jsonl", '{"code": 3}', "code = 3; a text is needed"),
        ("a.jsonl", "[]", "found list; an object of texts is needed"),
        ("a.jsonl", "", "no seeds in 1 files"),
        ("a.py", "def f(:", "a.py: no Python"),
        ("a.txt", "x", "unknown type of file; seeds are read from .py and .jsonl"),
    ],
)
def test_broken_seeds_are_named(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        made(config(seeds=str(tmp_path / name), count=1), 0)
    assert expected in str(caught.value)


def test_seeds_that_are_not_there_are_told_their_nearest():
    with pytest.raises(DataError, match="did you mean 'stdlib'"):
        made(config(seeds="stdlb", count=1), 0)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (
            {"seeds": "stdlib", "count": 1, "categories": ["bugfix"]},
            "category bugfix; did you mean 'bug_fix'",
        ),
        ({"seeds": "stdlib", "count": 1, "categories": {"bug_fix": 0}}, "a share is a number above 0"),
        ({"seeds": "stdlib", "count": 1, "categories": ["bug_fix", "bug_fix"]}, "stands there twice"),
        ({"seeds": "stdlib"}, "count is needed too"),
        ({"seeds": "stdlib", "count": 1, "from": "x.jsonl"}, "either from"),
        ({}, "either from"),
        ({"from": "x.jsonl", "categories": ["bug_fix"]}, "asked as they are; leave it out"),
    ],
)
def test_what_cannot_be_made_is_refused_in_words(prompts, expected):
    with pytest.raises(ConfigError) as caught:
        config(**prompts)
    assert expected in str(caught.value)


def test_a_resolved_config_is_read_again_as_the_same():
    asked = config(seeds="stdlib", count=3, categories={"bug_fix": "2"})
    assert Prompts.model_validate(asked.as_dict()) == asked
    plain = config(**{"from": "x.jsonl"})
    assert Prompts.model_validate(plain.as_dict()) == plain


def own(tmp_path, text):
    (tmp_path / "own.yaml").write_text(text)
    return str(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "function: {mine: 'Do {{ descripton }}'}",
            "function/mine: no field 'descripton'; did you mean 'desc",
        ),
        ("function: {mine: 'Do {{ description'}", "template function/mine, line 1: no Jinja"),
        ("funktion: {mine: 'x'}", "unknown category funktion; did you mean 'function'"),
        ("function: {mine: 3}", "function/mine: found 3; a text is needed"),
        ("function: [x]", "templates are {category: {name: text}}"),
        ("drawn: {who: x}\nfunction: {mine: x}", "templates are {category: {name: text}}"),
        (
            "function: {mine: '{{ description.__class__.__mro__ }}'}",
            "template function/mine: cannot be filled",
        ),
        ("function: {mine: '{% for i in range(10**9) %}x{% endfor %}'}", "cannot be filled"),
    ],
)
def test_a_template_at_fault_is_named_before_anything_is_paid(tmp_path, rows, text, expected):
    asked = config(seeds=rows(ROW), count=1, categories=["function"], templates=own(tmp_path, text))
    with pytest.raises(ConfigError) as caught:
        made(asked, 0)
    assert expected in str(caught.value)


def test_own_templates_replace_those_of_their_category_and_draw_from_own_lists(tmp_path, rows):
    text = "drawn: {mood: [kindly]}\nfunction: {mine: 'Say {{ mood }}: {{ topic }}'}"
    asked = Prompts(
        seeds=rows({"topic": "trees"}), count=1, categories=["function"], templates=own(tmp_path, text)
    )
    assert [text_of(prompt) for prompt in made(asked, 0)] == ["Say kindly: trees"]
    assert set(templates(own(tmp_path, text))) == set(CATEGORIES)


def test_more_prompts_than_can_be_made_are_refused(rows):
    with pytest.raises(DataError, match="5 are asked for in function, and 3 can be made of 1 seeds"):
        made(config(seeds=rows(ROW), count=5, categories=["function"]), 0)
