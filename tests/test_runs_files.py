"""Files of rows that are added to: a line is whole on disk, or it is not there.

Run: pytest tests/test_runs_files.py
"""

import errno
import os

import pytest

from kdlib.errors import RunError
from kdlib.runs.files import add_json_lines, is_refusal, is_torn, json_lines


def test_rows_are_read_as_they_were_added_and_hold_no_key(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sk-proj-0123456789abcdef0123456789abcdef")
    file = tmp_path / "rows.jsonl"
    assert json_lines(file) == []
    add_json_lines(file, [{"a": "é\u2028\n"}, {"b": os.environ["MY_API_KEY"]}])
    add_json_lines(file, [{"c": "half \ud83d"}], at_once=False)
    first, second, third = json_lines(file)
    assert first == {"a": "é\u2028\n"}
    assert os.environ["MY_API_KEY"] not in second["b"]
    assert third == {"c": "half ?"}


def test_a_line_that_is_written_just_now_is_not_read_and_one_that_a_kill_tore_is_cut(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a": 2')
    assert json_lines(file) == [{"a": 1}]
    assert is_torn(file)
    add_json_lines(file, [{"a": 3}])
    assert file.read_text() == '{"a": 1}\n{"a": 3}\n'
    assert not is_torn(file)


def test_a_broken_line_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a": 2\n{"a": 3}\n')
    with pytest.raises(RunError, match="line 2: found no JSON .* delete that line"):
        json_lines(file)


def test_a_disk_that_refuses_leaves_no_half_a_line(tmp_path, monkeypatch):
    file, write = tmp_path / "rows.jsonl", os.write
    add_json_lines(file, [{"a": 1}])

    def full(number, content):
        if len(content) < 12:
            raise OSError(28, "No space left on device")
        return write(number, content[:5])

    monkeypatch.setattr("kdlib.runs.files.os.write", full)
    with pytest.raises(RunError, match="cannot write"):
        add_json_lines(file, [{"a": 2, "b": 3}])
    assert file.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_known_in_the_words_of_safetensors(number):
    class SafetensorError(Exception):
        """By the name of safetensors' own, which cannot be made with a code."""

    said = SafetensorError(
        f'Error while serializing: I/O error: Os {{ code: {number}, kind: X, message: "" }}'
    )
    assert is_refusal(said)
    assert not is_refusal(SafetensorError("Error while deserializing header: header too large"))
