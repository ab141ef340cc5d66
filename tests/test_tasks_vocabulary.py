"""Tokens and the rows that stand for them: gaps, rows too few, no token to pad or to end with."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from kdlib.config.run import parse
from kdlib.errors import ModelError
from kdlib.models.loading import load_tokenizer
from kdlib.tasks.base import task_of


def added(folder, token, **roles):
    """The folder's tokenizer with one more token, whose id is the first without a row in the embedding."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    fillers = [f"<{number}>" for number in range(20)]  # ids 300 to 319: the rows that pad the head
    tokenizer.add_tokens([*fillers, token], special_tokens=True)
    for role in roles:
        setattr(tokenizer, role, token)
    tokenizer.save_pretrained(folder)


def test_a_token_without_a_row_is_refused_where_it_comes_and_only_there(raw_config, copied_teacher, tmp_path):
    added(copied_teacher, "<late>")
    raw = {**raw_config, "teacher": {"model": str(copied_teacher)}}
    tokenizer = load_tokenizer(str(copied_teacher))
    assert task_of(parse(raw)).prepare(parse(raw), tokenizer).vocabulary == 320
    path = tmp_path / "late.jsonl"
    path.write_text(
        '{"text": "the student says <late> again"}\n{"text": "what it sees when words come"}\n' * 9
    )
    late = parse(raw, [f"data.source={path}", "data.max_length=4"])
    with pytest.raises(ModelError, match=r"the token '<late>', whose id is 320, but .* has 320 rows"):
        task_of(late).prepare(late, tokenizer)


def test_ids_with_gaps_are_counted_by_the_largest(raw_config, copied_teacher):
    path = copied_teacher / "tokenizer.json"
    written = json.loads(path.read_text())
    written["added_tokens"].append({**written["added_tokens"][0], "id": 310, "content": "<far>"})
    written["model"]["vocab"]["<far>"] = 310
    path.write_text(json.dumps(written))
    tokenizer = load_tokenizer(str(copied_teacher))
    raw = {**raw_config, "teacher": {"model": str(copied_teacher)}}
    assert len(tokenizer) == 301
    assert task_of(parse(raw)).prepare(parse(raw), tokenizer).vocabulary == 311


def test_rows_are_padded_with_eos_where_the_pad_token_has_no_row(raw_config, copied_teacher):
    added(copied_teacher, "[PAD]", pad_token=True)
    tokenizer = load_tokenizer(str(copied_teacher))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<eos>", 0)


def test_a_tokenizer_that_can_neither_pad_nor_end_is_refused_with_what_to_set(copied_teacher):
    path = copied_teacher / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "eos_token": None, "pad_token": None}))
    with pytest.raises(
        ModelError, match=r"neither a pad token nor .*tokenizer_config.json, as `.eos_token.: "
    ):
        load_tokenizer(str(copied_teacher))
