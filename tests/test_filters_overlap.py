"""Overlap with benchmarks: a problem is found in other spaces and names, and much else is not.

Run: pytest tests/test_filters_overlap.py
"""

import ast
import json
import re

import pytest
from test_filters_sift import Answer

from kdlib.code.problems import read_problems
from kdlib.filters.config import Filters
from kdlib.filters.overlap import Benchmarks, bound_names, grams
from kdlib.filters.sift import sifted
from kdlib.prompts.config import Prompts
from kdlib.prompts.made import made
from kdlib.prompts.prompt import Prompt
from kdlib.prompts.seeds import stdlib


@pytest.fixture(scope="module")
def problems():
    return read_problems("humaneval")


@pytest.fixture(scope="module")
def humaneval(problems):
    return Benchmarks((each.task_id, each.prompt + each.solution) for each in problems)


def own_names(tree):
    nodes = list(ast.walk(tree))
    names = {node.arg for node in nodes if isinstance(node, ast.arg)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return names | {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def paraphrased(code, *, docstrings=True):
    """Other names, in text as in code; other spaces, lines and quotes, as `ast` writes them; no comments."""
    tree = ast.parse(code)
    names = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not docstrings and ast.get_docstring(node):
            node.body = node.body[1:]
    text = ast.unparse(tree)
    for number, name in enumerate(sorted(names)):
        text = re.sub(rf"\b{name}\b", f"other{number}", text)
    return text.replace("    ", "\t")


def test_every_problem_of_humaneval_is_found_in_other_spaces_and_names(problems, humaneval):
    found = [
        humaneval.in_text(f"Look:\n```\n{paraphrased(each.prompt + each.solution)}\n```") for each in problems
    ]
    assert found == [each.task_id for each in problems]


def test_most_solutions_are_found_without_their_text_and_the_rest_is_short(problems, humaneval):
    codes = [paraphrased(each.prompt + each.solution, docstrings=False) for each in problems]
    missed = [code for code in codes if humaneval.in_text(code) is None]
    assert len(missed) <= 32
    assert max(len(code.split("\n")) for code in missed) <= 6


def test_hardly_a_function_of_the_standard_library_is_taken_for_a_problem(humaneval):
    hit = [each.name for each in stdlib() if humaneval.in_text(each.fields["code"])]
    assert len(hit) <= 0.015 * len(stdlib()), hit


def test_a_planted_problem_is_sifted_out_and_built_in_prompts_stay(problems):
    prompts = made(Prompts(seeds="stdlib", count=80), 0)
    code = problems[3].prompt + problems[3].solution
    planted = Prompt((("user", "Say what this does."),), "explanation")
    answered = [(each, Answer("It does what it says.")) for each in prompts]
    answered.append((planted, Answer(f"You want\n```python\n{paraphrased(code)}\n```")))
    filters = Filters(near_duplicates=None)
    found = [reason for reason in sifted(filters, answered) if (reason or "").startswith("overlap")]
    assert found[-1] == "overlap: HumanEval/3"
    assert len(found) <= 3
    assert not [each for each in sifted(Filters(overlap=[]), answered) if (each or "").startswith("overlap")]


def test_a_file_of_problems_is_a_benchmark_too(tmp_path):
    text = "Write a function to find the shared elements from the given two lists."
    code = "def similar_elements(one, two):\n  found = tuple(set(one) & set(two))\n  return found"
    row = {
        "task_id": 2,
        "text": text,
        "code": code,
        "test_list": ["assert similar_elements((3, 4), (4, 7)) == (4,)"],
    }
    path = tmp_path / "mbpp.jsonl"
    path.write_text(json.dumps(row) + "\n")
    asked = Prompt((("user", "Please " + text.upper()),), "function")
    said = Answer("def common(a, b):\n    return {*a} & {*b}")
    assert sifted(Filters(overlap=[str(path)]), [(asked, said)]) == ["overlap: MBPP/2"]
    asked = Prompt((("user", "Find what two lists have in common."),), "function")
    assert sifted(Filters(overlap=[str(path)]), [(asked, said)]) == [None]


def test_names_that_code_binds_are_told_by_their_form():
    head = "def f(a, *b, c: dict[str, list[int]] = 3, **d):\n"
    code = "    x, y = a\n    z: int = 1\n    z += 2\n    for i in x:\n        g(lambda q: q == i, k=1)\n"
    assert bound_names(head + code) == set("fabcdxyziq")
    assert grams("too short to tell") == set()
