"""Mutated configs and data files through `kd doctor`: it finds, or refuses, in few words and soon.

MUTATIONS=2000 pytest -s tests/test_mutations.py   tries so many configs, and a tenth of it of data files.
"""

import contextlib
import gzip
import io
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import sentences, tiny_experiment

from kdlib.workbench import cli

MUTATIONS = int(os.environ.get("MUTATIONS", "40"))
MOST_BYTES, MOST_S = 10_000, 10
HOSTILE = [
    *(
        "null",
        "~",
        "''",
        '""',
        "[]",
        "{}",
        "[[[[]]]]",
        "{a: {b: {c: 1}}}",
        "yes",
        "no",
        "on",
        "true",
        "|",
        ">",
    ),
    *("010", "1:30", "0x1F", "1e400", "-1", "0", ".nan", ".inf", "-.inf", "9" * 400, "1_000", "2024-01-01"),
    *("'1'", "a" * 20_000, "é\u2028ü", "\\x1b[31m", '"\\x1b[31m\\0"', "causal-lm", "@x", "%x", "`x`", "? x"),
    *("!!python/object/apply:os.system ['true']", "&a [*a]", "*nobody", "<<: *a", "- a", "a:b", "linear"),
    *("{kd: }", "{kd: 1, kd: 2}", "{linear: [1]}", "{linear: [a, b]}", "[0, 1, 2]", "../../etc", "/", "."),
    *("/dev/null", "hf://x/y", "https://example.org/x", "[" * 3000, "{a: " * 500, '{"a": "\\u0000"}'),
]
MARKS = [
    "\t",
    "\x00",
    "\x1b[2J",
    "\ufeff",
    "\r",
    ":",
    "#",
    "- ",
    "  ",
    "'",
    '"',
    "{",
    "]",
    "&a ",
    "*a",
    "\u202e",
    "🦜",
]


def of_lines(
    change: Callable[[list[str], int, random.Random], object],
) -> Callable[[str, random.Random], str]:
    def changed(text: str, chance: random.Random) -> str:
        lines = text.splitlines()
        if lines:
            change(lines, chance.randrange(len(lines)), chance)
        return "\n".join(lines) + "\n"

    return changed


def value_of(lines, at, chance):
    lines[at] = lines[at].partition(":")[0] + ": " + chance.choice(HOSTILE)


def key_of(lines, at, chance):
    key, mark, value = lines[at].partition(":")
    letters = list(key)
    if letters:
        letters[chance.randrange(len(letters))] = chance.choice("abcdefghij_ -é")
    lines[at] = "".join(letters) + mark + value


def swapped(lines, at, chance):
    other = chance.randrange(len(lines))
    lines[at], lines[other] = lines[other], lines[at]


def marked(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text) + 1)
    return text[:at] + chance.choice(MARKS) + text[at:]


WAYS: list[Callable[[str, random.Random], str]] = [
    *[of_lines(value_of)] * 4,
    *[of_lines(key_of)] * 2,
    of_lines(swapped),
    of_lines(lambda lines, at, chance: lines.pop(at)),
    of_lines(lambda lines, at, chance: lines.insert(at, lines[chance.randrange(len(lines))])),
    of_lines(lambda lines, at, chance: lines.__setitem__(at, " " * chance.randrange(5) + lines[at].lstrip())),
    of_lines(lambda lines, at, chance: lines.insert(at, chance.choice(HOSTILE))),
    marked,
    lambda text, chance: text[: chance.randrange(len(text) + 1)],
]


def mutated(text: str, chance: random.Random) -> str:
    for _ in range(chance.choice([1, 1, 2, 3])):
        text = chance.choice(WAYS)(text, chance)
    return text


def bytes_mutated(content: bytes, chance: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(found) + 1)
        match chance.randrange(5):
            case 0 if at < len(found):
                found[at] ^= 1 << chance.randrange(8)
            case 1:
                found[at:at] = chance.randbytes(chance.choice([1, 3, 40]))
            case 2:
                del found[at : at + chance.choice([1, 10, 200])]
            case 3:
                words = [
                    b"\n",
                    b"null\n",
                    b"[]\n",
                    b'"',
                    b"{",
                    b",,,",
                    b"\xff\xfe",
                    b"\x00",
                    b"\r",
                    b"NaN",
                    b"1" * 5000,
                ]
                found[at:at] = chance.choice(words)
            case _:
                found[at:at] = found[: chance.randrange(300)]
    return bytes(found)


def said_of(config: Path, place: Path) -> tuple[int, str, float]:
    """(exit status, what was printed, CPU seconds) of `kd doctor --quick`."""
    said, status, before, began = io.StringIO(), 99, sys.argv, time.process_time()
    sys.argv = ["kd", "doctor", str(config), "--quick"]
    with contextlib.chdir(place), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        except BaseException:
            traceback.print_exc(file=said)
        finally:
            sys.argv = before
    return status, said.getvalue(), time.process_time() - began


def fault(status: int, said: str, seconds: float) -> str:
    """What is wrong with how it ended; "" where nothing is."""
    if status not in (0, 1, 2) or "Traceback" in said:
        return f"exit status {status}"
    if len(said.encode()) > MOST_BYTES:
        return f"{len(said.encode()):,} bytes"
    if any(ord(sign) < 32 and sign not in "\n\r\t" for sign in said):
        return "control bytes"
    return f"{seconds:.0f} s" if seconds > MOST_S else ""


@pytest.fixture(scope="module")
def place(tmp_path_factory, teacher_folder) -> Path:
    place = tmp_path_factory.mktemp("mutations")
    (place / "configs").mkdir()
    (place / "notebooks").mkdir()
    raw = tiny_experiment(teacher_folder, place)
    (place / "sound.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    assert said_of(place / "sound.yaml", place)[0] in (0, 2)
    return place


@pytest.mark.timeout(60 + 3 * MUTATIONS)
def test_a_mutated_config_is_sound_or_refused(place, teacher_folder):
    quickstart = (Path(__file__).parent.parent / "configs" / "quickstart.yaml").read_text()
    text = quickstart.replace("smollm2-135m-instruct", str(teacher_folder)).replace("layers: 15", "layers: 2")
    sources = [(place / "sound.yaml").read_text(), text.replace("python-docs", str(place / "text.jsonl"))]
    wrong = []
    for number in range(MUTATIONS):
        chance = random.Random(number)
        file = place / "mutated.yaml"
        file.write_text(
            mutated(sources[number % 2], chance), encoding="utf-8", errors="surrogatepass", newline=""
        )
        status, said, seconds = said_of(file, place)
        if found := fault(status, said, seconds):
            wrong.append(f"{number}: {found}: {said[-600:]}")
    assert not wrong, "\n\n".join(wrong)


def forms(place: Path) -> dict[str, bytes]:
    """Sound files of text, by their names."""
    rows = [{"text": line, "n": number} for number, line in enumerate(sentences(60, seed=2))]
    table, lines = pd.DataFrame(rows), "".join(json.dumps(row) + "\n" for row in rows)
    table.to_parquet(place / "t.parquet")
    return {
        "a.jsonl": lines.encode(),
        "a.json": json.dumps(rows).encode(),
        "a.csv": table.to_csv(index=False).encode(),
        "a.tsv": table.to_csv(index=False, sep="\t").encode(),
        "a.txt": "\n".join(table["text"]).encode(),
        "a.parquet": (place / "t.parquet").read_bytes(),
        "a.jsonl.gz": gzip.compress(lines.encode(), mtime=0),
    }


@pytest.mark.timeout(60 + MUTATIONS)
def test_a_mutated_data_file_is_read_or_refused(place, teacher_folder, tmp_path):
    sound, raw, wrong = forms(tmp_path), yaml.safe_load((place / "sound.yaml").read_text()), []
    for number in range(max(MUTATIONS // 10, 2 * len(sound))):
        chance, name = random.Random(number), [*sound][number % len(sound)]
        file = tmp_path / f"{number}_{name}"
        file.write_bytes(bytes_mutated(sound[name], chance))
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump({**raw, "data": {**raw["data"], "source": str(file)}}))
        status, said, seconds = said_of(config, place)
        if found := fault(status, said, seconds):
            wrong.append(f"{number} {name}: {found}: {said[-600:]}")
    assert not wrong, "\n\n".join(wrong)
