"""Files as people have them are read as they stand, or refused with what to do; never as they once were."""

import os
import re

import pytest
from datasets import Dataset
from made_files import CARD, FORMS, archive, file, lines, packed, table

from kdlib.config.data import DataConfig
from kdlib.errors import DataError
from kdlib.sources.places import identity, read_splits
from kdlib.sources.rows import check_column


def read(source, **settings) -> dict:
    """Every split's rows, as a classification asks for them."""
    config = DataConfig(source=str(source), **settings)
    found = read_splits(config)
    if config.header is not False:
        check_column(config, found["train"], "text", "data.text")
    return {name: [*rows] for name, rows in found.items()}


@pytest.mark.parametrize(("make", "settings", "expected"), FORMS.values(), ids=FORMS.keys())
def test_a_form_is_read_as_it_stands_or_refused_with_what_to_do(tmp_path, make, settings, expected):
    source = tmp_path / make(tmp_path)
    if isinstance(expected, str):
        with pytest.raises(DataError) as caught:
            read(source, **settings)
        assert re.search(expected, str(caught.value))
        assert str(tmp_path) in str(caught.value)
        return
    assert read(source, **settings) == (expected if isinstance(expected, dict) else {"train": expected})
    streamed = read(source, **settings, streaming=True)
    assert streamed == (expected if isinstance(expected, dict) else {"train": expected})


def carded(folder, rows):
    """A folder as `datasets` knows it by its name and card alone."""
    file("rows/README.md", CARD)(folder)
    (folder / "rows" / "parts").mkdir(exist_ok=True)
    for name in ("first", "second"):
        Dataset.from_list(rows).to_parquet(folder / "rows" / "parts" / f"{name}.parquet")
    return "rows"


WAYS = {
    "a card": carded,
    "an archive": lambda folder, rows: archive("rows.zip", {"a.jsonl": lines(rows)})(folder),
    "a .gz": lambda folder, rows: packed("rows.jsonl.gz", lines(rows))(folder),
    "a table": lambda folder, rows: file("rows.csv", table(rows))(folder),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_what_changed_is_read_anew_even_where_its_time_and_size_are_the_same(tmp_path, way):
    """As after `cp -p` or `rsync -t`; a folder with a card, which counts 40 rows, was known by its name."""
    old, new = ([{"text": f"{word} {n}", "label": n % 2} for n in range(5)] for word in ("one", "two"))
    source = tmp_path / way(tmp_path, old)
    places = [path for path in tmp_path.rglob("*") if path.is_file()]
    times = {path: path.stat().st_mtime_ns for path in places}
    before = identity(DataConfig(source=str(source)))
    assert [row["text"] for row in read(source)["train"]] == [row["text"] for row in old]
    assert identity(DataConfig(source=str(source))) == before
    way(tmp_path, new)
    for path in places:
        os.utime(path, ns=(times[path], times[path]))
    assert [row["text"] for row in read(source)["train"]] == [row["text"] for row in new]
    assert identity(DataConfig(source=str(source))) != before


def test_what_stands_beside_a_text_keeps_its_own_kind(tmp_path):
    """Of each row its own keys: what others have is not made up for it."""
    calls = [{"role": "a", "calls": [{"city": "x"}]}, {"role": "b", "calls": [{"day": 1}], "content": "5"}]
    rows = [{"text": "a", "messages": calls, "n": 1}, {"text": "b", "messages": None, "n": 2.5}]
    source = tmp_path / file("rows.jsonl", lines(rows))(tmp_path)
    assert read(source)["train"] == rows
    assert str(read_splits(DataConfig(source=str(source)))["train"].features["text"]) == "Value('string')"
