"""The forms in which people have rows, made by what writes them; `python tests/made_files.py` prints them.

{a form: (how it is made, settings, what is read)}: {split: rows}, the rows of train alone, or what is said
where it is refused.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import zstandard
from datasets import Dataset, DatasetDict

Make = Callable[[Path], str]  # in an empty folder; returns the source's name in it
PACKERS = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}

ROWS = [{"text": f"é text, {n}", "label": "ab"[n % 2]} for n in range(4)]
NUMBERED = [{**row, "label": "ab".index(row["label"])} for row in ROWS]
ODD = [
    dict(zip(("text", "label"), row, strict=True))
    for row in (("None", "NA"), ("2024-01-01", "null"), ("007", "1.0"))
]
PAGES = [{"text": row["text"]} for row in ROWS]
TEXT = "\n\n".join(row["text"] for row in ROWS)
FRAME, SET = pd.DataFrame(ROWS), Dataset.from_list(ROWS)
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: "parts/first*"}
  - {split: test, path: "parts/second*"}
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {"0": a, "1": b}}}}
  splits:
  - {name: train, num_examples: 40, num_bytes: 4000}
---
"""


def lines(rows: list[dict], **how: Any) -> str:
    """JSON Lines, or with `indent` objects that take several."""
    return "".join(json.dumps(row, **{"ensure_ascii": False, **how}) + "\n" for row in rows)


def table(rows: list[dict] = ROWS, separator: str = ",", header: bool = True) -> str:
    """As Python's csv writes it."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def file(name: str, content: str | bytes, encoding: str = "utf-8") -> Make:
    """A file with this content."""
    return written(
        name,
        lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding)),
    )


def written(name: str, write: Callable[[Path], object]) -> Make:
    """What a package writes to a path."""

    def make(folder: Path) -> str:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name)
        return name

    return make


def packed(name: str, content: str, cut: int = 0) -> Make:
    """A compressed file, without its last bytes."""
    made = PACKERS[Path(name).suffix.lower()](content.encode())
    return file(name, made[: len(made) - cut])


def archive(name: str, held: dict[str, str]) -> Make:
    """A .zip of these files."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as made:
            for each, content in held.items():
                made.writestr(each, content)

    return written(name, write)


def pandas(name: str, how: str, **options: Any) -> Make:
    """`FRAME.to_csv(path, …)`, `FRAME.to_json(path, …)`."""
    return written(name, lambda path: getattr(FRAME, f"to_{how}")(path, **options))


def several(source: str, *each: Make) -> Make:
    """Files below one source."""

    def make(folder: Path) -> str:
        for one in each:
            one(folder)
        return source

    return make


LINES, ONE = lines(ROWS), lines(ROWS[:1])
BY_LINE = {"orient": "records", "lines": True}
LIST, HELD = json.dumps(ROWS), json.dumps({"data": ROWS})
BOTH = {"train": ROWS, "test": ROWS[:1]}
SHARD = "rows/data/{}-00000-of-00001.parquet"
DAMAGED = zstandard.compress(table().encode())[:-9] + bytes(9)
BROKEN = LINES + '{"text": \nrows\n'

JSON = {
    "JSON Lines (json)": (file("rows.jsonl", LINES), {}, ROWS),
    "JSON Lines (datasets)": (written("rows.jsonl", SET.to_json), {}, ROWS),
    "JSON Lines (pandas)": (pandas("rows.jsonl", "json", **BY_LINE), {}, ROWS),
    "JSON Lines with a byte-order mark": (file("rows.jsonl", LINES, "utf-8-sig"), {}, ROWS),
    "JSON Lines with Windows' line ends": (file("rows.jsonl", LINES.replace("\n", "\r\n")), {}, ROWS),
    "JSON Lines with empty lines": (file("rows.jsonl", "\n" + LINES.replace("\n", "\n\n")), {}, ROWS),
    "JSON Lines without a last line end": (file("rows.jsonl", LINES.strip()), {}, ROWS),
    "JSON Lines in ASCII": (file("rows.jsonl", lines(ROWS, ensure_ascii=True)), {}, ROWS),
    "JSON Lines as .json": (file("rows.json", LINES), {}, ROWS),
    "JSON Lines as .ndjson": (file("rows.ndjson", LINES), {}, ROWS),
    "JSON Lines as .JSONL": (file("ROWS.JSONL", LINES), {}, ROWS),
    "JSON Lines in UTF-16": (file("rows.jsonl", LINES, "utf-16"), {"encoding": "utf-16"}, ROWS),
    "the same, unsaid": (file("rows.jsonl", LINES, "utf-16"), {}, "no text in utf-8 .* data.encoding"),
    "texts None, NA, null, dates, numbers": (file("rows.jsonl", lines(ODD)), {}, ODD),
    "JSON list (json)": (file("rows.json", LIST), {}, ROWS),
    "JSON list, indented": (file("rows.json", json.dumps(ROWS, indent=2)), {}, ROWS),
    "JSON list (pandas)": (pandas("rows.json", "json", orient="records"), {}, ROWS),
    "JSON list (datasets)": (written("rows.json", lambda path: SET.to_json(path, lines=False)), {}, ROWS),
    "JSON list as .jsonl": (file("rows.jsonl", LIST), {}, ROWS),
    "JSON list as .jsonl, with a mark": (file("rows.jsonl", "\n" + LIST, "utf-8-sig"), {}, ROWS),
    "indented objects as .jsonl": (file("rows.jsonl", lines(ROWS, indent=2)), {}, ROWS),
    "an object that holds the rows": (file("rows.json", HELD), {"field": "data"}, ROWS),
    "the same, not told where": (file("rows.json", HELD), {}, "under 'data', set data.field: data"),
    "the same, told wrongly": (file("rows.json", HELD), {"field": "rows"}, "nothing under 'rows' .* data"),
    "a table's JSON (pandas)": (
        pandas("rows.json", "json", orient="table", index=False),
        {"field": "data"},
        ROWS,
    ),
    "a line that is null": (file("rows.jsonl", LINES + "null\n"), {}, "line 5: not an object: 'null'"),
    "lines that are null alone": (file("rows.jsonl", "null\nnull\n"), {}, "entry 0: not an object"),
    "a list that holds null": (file("rows.json", json.dumps([*ROWS, None])), {}, "entry 4: not an object"),
    "broken lines": (file("rows.jsonl", BROKEN), {}, "2 broken lines\n  line 5: .*\n  line 6: "),
    "a broken list": (file("rows.json", LIST[:-9]), {}, "broken JSON in line 1, column"),
    "one broken line": (file("rows.jsonl", LINES + "{"), {}, "rows.jsonl: 1 broken line\n  line 5: "),
    "half a character": (file("rows.jsonl", LINES + '{"text": "\\ud83d"}'), {}, "line 5: .*surrogates"),
    "a number of more than 64 bits": (
        file("rows.jsonl", LINES + '{"n": 99999999999999999999}'),
        {},
        "64 bits",
    ),
    "a key that stands twice": (file("rows.jsonl", '{"a": 1, "a": 2}\n'), {}, "'a' stands twice"),
}
COMPRESSED = {
    ".jsonl.gz (gzip)": (packed("rows.jsonl.gz", LINES), {}, ROWS),
    ".jsonl.gz (pandas)": (pandas("rows.jsonl.gz", "json", **BY_LINE), {}, ROWS),
    ".JSONL.GZ": (packed("ROWS.JSONL.GZ", LINES), {}, ROWS),
    ".jsonl.zst (zstandard)": (packed("rows.jsonl.zst", LINES), {}, ROWS),
    ".jsonl.bz2": (packed("rows.jsonl.bz2", LINES), {}, ROWS),
    ".jsonl.xz": (packed("rows.jsonl.xz", LINES), {}, ROWS),
    ".json.gz, a list": (packed("rows.json.gz", LIST), {}, ROWS),
    ".csv.gz (pandas)": (pandas("rows.csv.gz", "csv", index=False), {}, ROWS),
    ".csv.zst (pandas)": (pandas("rows.csv.zst", "csv", index=False), {}, ROWS),
    ".TSV.gz": (packed("rows.TSV.gz", table(separator="\t")), {}, ROWS),
    ".txt.gz": (packed("rows.txt.gz", TEXT), {}, PAGES),
    ".zip of one file (zipfile)": (archive("rows.zip", {"rows.jsonl": LINES}), {}, ROWS),
    ".csv.zip (pandas)": (pandas("rows.csv.zip", "csv", index=False), {}, ROWS),
    ".zip of macOS": (archive("rows.zip", {"a/b.jsonl": LINES, "__MACOSX/a/._b.jsonl": "x"}), {}, ROWS),
    ".zip of train and test": (archive("rows.zip", {"train.jsonl": LINES, "test.jsonl": ONE}), {}, BOTH),
    ".zip of two forms": (archive("rows.zip", {"a.jsonl": LINES, "b.csv": "a"}), {}, "several forms"),
    "a .zip that is none": (file("rows.zip", LINES), {}, "cannot be read: File is not a zip file"),
    "a .gz that is cut short": (
        packed("rows.jsonl.gz", LINES, cut=12),
        {},
        "gz: cannot be read: Compr",
    ),
    "a .zst that is cut short": (packed("rows.txt.zst", TEXT, cut=3), {}, "zst: cannot be read: Compr"),
    "a .zst that is damaged": (file("rows.csv.zst", DAMAGED), {}, "zst: cannot be read: .*corrupt"),
    "a .gz that is none": (file("rows.jsonl.gz", LINES), {}, "Not a gzipped file"),
    "a .gz of what it does not say": (packed("rows.gz", LINES), {}, "rows.gz: unknown type of file"),
    "a .gz with a line that is null": (packed("rows.jsonl.gz", LINES + "null"), {}, "line 5: not an object"),
}
TABLES = {
    ".csv (csv)": (file("rows.csv", table()), {}, ROWS),
    ".csv (datasets)": (written("rows.csv", SET.to_csv), {}, ROWS),
    ".csv (pandas)": (pandas("rows.csv", "csv", index=False), {}, ROWS),
    ".csv with an index (pandas)": (
        pandas("rows.csv", "csv"),
        {},
        [{"Unnamed: 0": str(number), **row} for number, row in enumerate(ROWS)],
    ),
    ".csv with a byte-order mark (Excel)": (file("rows.csv", table(), "utf-8-sig"), {}, ROWS),
    ".CSV": (file("ROWS.CSV", table()), {}, ROWS),
    ".csv of None, NA, null, dates, numbers": (file("rows.csv", table(ODD)), {}, ODD),
    ".csv with quotes and lines in its fields": (
        file("rows.csv", table([{"text": 'one,\n"two"', "label": "a"}] * 2)),
        {},
        [{"text": 'one,\n"two"', "label": "a"}] * 2,
    ),
    ".csv with semicolons": (file("rows.csv", table(separator=";")), {"separator": ";"}, ROWS),
    ".csv with semicolons, unsaid": (
        file("rows.csv", "text;label\na;b\n"),
        {},
        "text;label: .*data.separator",
    ),
    ".csv with tabs": (file("rows.csv", table(separator="\t")), {"separator": "tab"}, ROWS),
    ".tsv": (file("rows.tsv", table(separator="\t")), {}, ROWS),
    ".csv in cp1252": (file("rows.csv", table(), "cp1252"), {"encoding": "cp1252"}, ROWS),
    ".csv in cp1252, unsaid": (file("rows.csv", table(), "cp1252"), {}, "no text in utf-8 .* data.encoding"),
    ".csv without a header (DBpedia)": (
        file("rows.csv", table(header=False)),
        {"header": ["text", "label"]},
        ROWS,
    ),
    ".csv without a header, by number (MMLU)": (
        several("*.csv", file("a.csv", "text,1\n02,b\n"), file("b.csv", "c,3\n")),
        {"header": False},
        [{"0": "text", "1": "1"}, {"0": "02", "1": "b"}, {"0": "c", "1": "3"}],
    ),
    ".csv without a header, unsaid": (file("rows.csv", table(header=False)), {}, "'text'; .* data.header"),
    ".csv with a header too short": (
        file("rows.csv", table(header=False)),
        {"header": ["text"]},
        "line 1 has 2 fields, and data.header names 1 columns",
    ),
    ".csv with a field more in each row": (file("rows.csv", "text,label\na,b,c\n"), {}, "line 2 has more"),
    ".csv with a field more in one row": (
        file("rows.csv", table() + "a,b,c\n"),
        {},
        "in line 6, saw 3",
    ),
    ".csv files of other columns": (
        several("*.csv", file("a.csv", table()), file("b.csv", "text,class\na,b\n")),
        {},
        "b.csv: cannot be read: line 1 names text, class, where other files have text, label",
    ),
}
OTHERS = {
    ".parquet (datasets)": (written("rows.parquet", SET.to_parquet), {}, ROWS),
    ".parquet (pandas)": (pandas("rows.parquet", "parquet"), {}, ROWS),
    ".parquet of categories (pandas)": (
        written("rows.parquet", FRAME.astype({"label": "category"}).to_parquet),
        {},
        ROWS,
    ),
    ".pq": (written("rows.pq", SET.to_parquet), {}, ROWS),
    ".PARQUET": (written("ROWS.PARQUET", SET.to_parquet), {}, ROWS),
    "a .parquet that is none": (file("rows.parquet", LINES), {}, "rows.parquet: cannot be read: Parquet"),
    ".arrow (datasets)": (
        several("saved/data-00000-of-00001.arrow", written("saved", SET.save_to_disk)),
        {},
        ROWS,
    ),
    ".txt": (file("rows.txt", TEXT), {}, PAGES),
    ".TXT of Windows": (file("rows.TXT", TEXT.replace("\n", "\r\n"), "utf-8-sig"), {}, PAGES),
    ".md": (file("rows.md", TEXT), {}, PAGES),
    "another ending": (file("rows.xlsx", "x"), {}, "unknown type of file; it may be .jsonl"),
    "an empty file": (file("rows.jsonl", ""), {}, "is empty"),
    "a setting that does not belong": (
        file("rows.jsonl", LINES),
        {"separator": ";"},
        "is of csv files",
    ),
    "a subset of files": (file("rows.jsonl", LINES), {"subset": "en"}, "data.subset: found 'en'"),
}
FOLDERS = {
    "a folder that datasets saved": (written("saved", DatasetDict(train=SET).save_to_disk), {}, ROWS),
    "a saved folder that is damaged": (
        several(
            "saved",
            written("saved", SET.save_to_disk),
            file("saved/dataset_info.json", json.dumps({"features": {"text": "string"}})),
        ),
        {},
        "saved: its card or description is damaged",
    ),
    "a folder as on the hub": (
        several(
            "rows",
            written(SHARD.format("train"), SET.to_parquet),
            written(SHARD.format("test"), SET.select([0]).to_parquet),
            file("rows/README.md", "# Rows"),
            file("rows/LICENSE.txt", "free"),
        ),
        {},
        BOTH,
    ),
    "a folder with a card": (
        several(
            "rows",
            file("rows/parts/first.jsonl", lines(NUMBERED)),
            file("rows/parts/second.jsonl", lines(NUMBERED[:1])),
            file("rows/README.md", CARD),
        ),
        {},
        {"train": NUMBERED, "test": NUMBERED[:1]},
    ),
    "a folder with a damaged card": (
        several("rows", file("rows/a.jsonl", LINES), file("rows/README.md", CARD.replace("- {", "-100 - {"))),
        {},
        "rows: its card or description is damaged: ",
    ),
    "a folder with a card of nothing": (
        several("rows", file("rows/a.jsonl", LINES), file("rows/README.md", "---\nconfigs: 7\n---\n")),
        {},
        "rows: cannot be read: Expected configs to be a list",
    ),
    "a folder for each split": (
        several("rows", file("rows/train/a.jsonl", LINES), file("rows/test/a.jsonl", ONE)),
        {},
        BOTH,
    ),
    "a folder of parts, one packed": (
        several("rows", file("rows/a.JSONL", ONE), packed("rows/b.jsonl.gz", lines(ROWS[1:]))),
        {},
        ROWS,
    ),
    "a folder of texts": (several("rows", file("rows/a.txt", TEXT)), {}, PAGES),
    "a fol[de]r": (several("fol[de]r", file("fol[de]r/a.jsonl", LINES)), {}, ROWS),
    "a folder of two forms": (
        several("rows", file("rows/a.jsonl", LINES), file("rows/b.jsonl", LINES), file("rows/c.csv", "a")),
        {},
        r"several forms, .csv \(c.csv\), .jsonl .*; name those to be read by a pattern",
    ),
    "a file of no split": (
        several("rows", file("rows/train.jsonl", LINES), file("rows/more.jsonl", LINES)),
        {},
        "more.jsonl: belongs to no split by its name, as train.jsonl beside it does",
    ),
    "a file of two splits": (
        several("rows", file("rows/train_test.jsonl", LINES)),
        {},
        "and test; rename",
    ),
    "an archive among files": (
        several("rows", file("rows/a.jsonl", LINES), file("rows/b.zip", "x")),
        {},
        "b.zip: unknown type of file",
    ),
    "a folder of nothing known": (several("rows", file("rows/a.xlsx", "x")), {}, "no data file in it"),
    "a split of another name": (
        several("rows", written(SHARD.format("train_sft"), SET.to_parquet)),
        {"train": "train_sft"},
        ROWS,
    ),
    "a split of another name, unsaid": (
        several("rows", written(SHARD.format("train_sft"), SET.to_parquet)),
        {},
        "has the splits train_sft; name the one to train on in data.train",
    ),
    "a pattern": (several("a*.jsonl", file("a1.jsonl", LINES), file("b.csv", "a")), {}, ROWS),
    "a pattern over folders": (several("**/*.jsonl", file("a/b/c.jsonl", LINES)), {}, ROWS),
    "a pattern over splits": (
        several("rows/*.jsonl", file("rows/train.jsonl", LINES), file("rows/test.jsonl", ONE)),
        {},
        BOTH,
    ),
    "a pattern of one split": (
        several("rows/te*", file("rows/train.jsonl", "x"), file("rows/test.jsonl", LINES)),
        {},
        ROWS,
    ),
    "a pattern of two forms": (
        several("a*", file("a.jsonl", LINES), file("a.csv", "a")),
        {},
        "several forms",
    ),
    "a pattern of no file": (several("*.jsonl"), {}, "no file is called so"),
}
FORMS: dict[str, tuple[Make, dict, Any]] = {
    **JSON,
    **COMPRESSED,
    **TABLES,
    **OTHERS,
    **{f"folders: {name}": each for name, each in FOLDERS.items()},
}


if __name__ == "__main__":
    for form, (_, told, expected) in FORMS.items():
        print(
            f"| {form} | {told or ''} | {f'refused: {expected}' if isinstance(expected, str) else 'read'} |"
        )
