import re

import numpy as np
import pytest
from conftest import sentences, tiny_tokenizer
from made_predictions import EVIL, Page, evil_facts, softmax

from kdlib.data.batches import collate
from kdlib.losses.signals import IGNORED
from kdlib.plots.softening import (
    Predictions,
)
from kdlib.plots.tokens import (
    SpanView,
    candidate_bars,
    hardest,
    heat_map,
    limit,
    message,
    token_view,
    values,
    visible,
)


def test_text_of_tokens_stays_text_and_out_of_formulas():
    page = Page(heat_map(evil_facts(), "distilled"))
    assert "script" not in page.tags
    assert not [name for name in page.attributes if name.startswith("on")]
    for text in (
        "<script>alert(1)</script>",
        "$x^2$",
        "]]>",
        "</style>",
        '"onmouseover="alert(2)',
        "\\x07",
        "\\x202e",
        "&amp;",
    ):
        assert page.code.count(text) >= 3
    assert "$" not in heat_map(evil_facts(), "distilled").replace("$x^2$", "", page.code.count("$x^2$"))


def test_the_candidates_of_a_token_are_escaped_too():
    logits = {
        name: np.arange(len(EVIL), dtype=np.float32)[None].repeat(len(EVIL), 0)
        for name in ("teacher", "untrained")
    }
    predictions = Predictions(EVIL, EVIL, np.arange(len(EVIL)), logits, EVIL.__getitem__)
    page = Page(candidate_bars(predictions, 4, 2.0, 4096))
    assert "script" not in page.tags
    assert not [name for name in page.attributes if name.startswith("on")]
    assert all(text in page.code for text in ("<script>alert(1)</script>", "$x^2$", "\\x07", "</style>"))


def test_bars_say_what_lies_outside_and_what_the_student_gives(predictions):
    page = candidate_bars(predictions, 3, 2.0, 16)
    teacher, student = (softmax(predictions.logits[name][3], 2.0) for name in ("teacher", "distilled"))
    order = np.argsort(-teacher)[:16]
    assert f"<b>{100 * (1 - teacher[order].sum()):.3g} %</b> of its mass lies outside the top 16" in page
    assert f"the distilled student gives the same tokens {100 * student[order].sum():.3g} %" in page
    assert f"entropy is <b>{-(teacher * np.log(teacher)).sum():.2f} nats</b>" in page
    assert "4 more of the top 16" in page
    assert "<b>0 %</b> of its mass lies outside the top 300" in candidate_bars(predictions, 3, 2.0, 100_000)


def test_the_hardest_come_first_by_each_measure():
    facts = evil_facts()
    assert hardest(facts, "distilled", "kl", 3) == [8, 7, 6]
    assert hardest(facts, "distilled", "differs", 5) == [7, 5, 3, 1, 8]
    assert (
        message(facts, "distilled", "differs")
        == "Teacher and distilled student have different first choices at 4 of 9 tokens"
    )
    assert message(facts, "distilled", "kl") == (
        "Half of the distilled student's KL to the teacher sits in 3 of 9 tokens; the mean is 0.40 nats"
    )


def test_colours_mean_the_same_for_all_students(facts):
    assert limit(facts, "kl") == pytest.approx(
        np.percentile([values(facts, s, "kl") for s in facts["students"]], 95), rel=0.05
    )
    for student in facts["students"]:
        strongest = f"{0.72 * min(1, values(facts, student, 'kl').max() / limit(facts, 'kl')):.2f}"
        assert f"--kl:{strongest}" in heat_map(facts, student)
    assert limit(facts, "differs") == 1


def test_a_reader_chooses_the_measure_on_the_page_and_a_widget_by_its_class(facts):
    assert heat_map(facts, "distilled").count('type="radio"') == 3
    chosen_measure = heat_map(facts, "distilled", "ce", marked=4)
    assert 'type="radio"' not in chosen_measure
    assert 'class="kd-heat ce"' in chosen_measure
    assert chosen_measure.split("resting")[-1].count("came, token 5<") == 1


def view(row, rows=("the student learns", "a teacher says what it sees when words come back")):
    tokenizer = tiny_tokenizer(sentences(50))
    batch = collate([{"input_ids": tokenizer(text)["input_ids"]} for text in rows], pad_id=0)
    ids, labels, read = (batch[name][row].tolist() for name in ("input_ids", "labels", "attention_mask"))
    return token_view(ids, [label != IGNORED for label in labels], read, tokenizer.decode)


def test_each_token_is_learned_or_read_or_padding():
    short, long = view(0), view(1)
    learned = short.states.count("learned")
    assert short.states == ["context"] + ["learned"] * learned + ["padding"] * (
        len(long.states) - learned - 1
    )
    assert "".join(short.texts[: learned + 1]) == "the student learns"
    assert set(long.states[1:]) == {"learned"}


def test_text_from_data_stays_text_and_white_space_is_seen():
    shown = view(0, rows=("<script> alert </script>", "a"))
    assert "<script" not in shown._repr_html_()
    assert "&lt;" in shown._repr_html_()
    assert visible("a b\n\t\x07") == "a·b⏎→\\x07"


def test_the_legend_counts_what_occurs():
    assert "padding" not in str(view(1))
    assert f"learned: {view(0).states.count('learned')} (" in str(view(0))
    assert f"padding: {view(0).states.count('padding')} (" in str(view(0))
    assert "\x1b[" in str(view(0))


SPANS = [
    ("apart", [], ["<s>"]),
    ("single", ["<script>alert(1)</script>"], ["$x^2$"]),
    ("several", ["1", "2\n"], ["12\n"]),
    ("single", [" and"], [" and"]),
]


def test_a_text_that_two_tokenizers_cut_is_shown_span_by_span_and_stays_text():
    html = SpanView(SPANS)._repr_html_()
    page = Page(html)
    assert "script" not in page.tags
    assert all(text in page.code for text in ("<script>alert(1)</script>", "$x^2$", "12⏎", "<s>"))
    assert "$" not in html.replace("$x^2$", "", page.code.count("$x^2$"))
    for words in ("one token on both sides: 2", "the same bytes in other tokens: 1", "not compared: 1"):
        assert words in html


def test_in_a_terminal_the_students_tokens_stand_above_the_teachers():
    plain = re.sub(r"\x1b\[[\d;]*m", "", str(SpanView(SPANS))).splitlines()
    assert plain[0].split() == ["<script>alert(1)</script>", "1|2⏎"]
    assert plain[1].split() == ["<s>", "$x^2$", "12⏎"]
    assert plain[0].index("1|2") == plain[1].index("12")
    assert plain[3].split() == plain[4].split() == ["·and"]
    wide = re.sub(r"\x1b\[[\d;]*m", "", str(SpanView(SPANS[3:] * 60))).splitlines()
    assert max(map(len, wide)) <= 101
