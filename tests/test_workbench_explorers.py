import math
from html.parser import HTMLParser

import ipywidgets
import numpy as np
import pytest
import torch
from conftest import sentences, tiny_model, tiny_tokenizer
from datasets import Dataset
from IPython.display import HTML

from kdlib.config.run import parse
from kdlib.data.batches import Prepared, collate
from kdlib.errors import RunError
from kdlib.evaluation import predictions as sights
from kdlib.models.student import shallower
from kdlib.models.teacher import LiveTeacher
from kdlib.plots.softening import (
    TEMPERATURES,
    Predictions,
    chosen,
    message as softening_message,
    sizes,
    softened,
    softening,
    softening_figure,
    softening_of,
)
from kdlib.plots.tokens import candidate_bars, hardest, heat_map, limit, message, probabilities, values
from kdlib.reports import explorers as still
from kdlib.runs import folder as runs
from kdlib.runs.folder import PARENT
from kdlib.tasks.language_modeling import TOKENS, LanguageModeling, beginnings
from kdlib.workbench import explorers
from kdlib.workbench.explorers import HeatMapExplorer, ScheduleDesigner, TemperatureExplorer
from kdlib.workbench.session import Workbench

EVIL = [
    "<script>alert(1)</script>",
    "$x^2$",
    "\x07",
    "]]>",
    "</style>",
    '"onmouseover="alert(2)',
    "\u202e",
    "&amp;",
    "a\nb",
]


def softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(sentences(200))


@pytest.fixture(scope="module")
def rows(tokenizer):
    return [{"input_ids": ids} for ids in tokenizer(sentences(6, seed=3))["input_ids"]]


@pytest.fixture(scope="module")
def voices(tokenizer):
    teacher = tiny_model().eval()
    return {
        "teacher": teacher,
        "distilled": shallower(teacher, [0, 3]),
        "baseline": tiny_model(seed=5).eval(),
    }


@pytest.fixture(scope="module")
def sight(voices, rows, tokenizer) -> Predictions:
    made = Prepared(Dataset.from_list(rows), Dataset.from_list(rows), {}, collate, len(tokenizer))
    loads = {name: lambda m=model: LiveTeacher(m, len(tokenizer)) for name, model in voices.items()}
    return sights.look(loads, LanguageModeling().sample(made, tokenizer, tokens=40), "token")


@pytest.fixture(scope="module")
def facts(sight):
    return sights.summary(
        sight,
        parse(
            {
                "teacher": {"model": "x"},
                "student": {"from": "teacher", "layers": 2},
                "data": {"source": "x"},
                "training": {},
                "loss": {"weights": {"kd": 1.0}, "temperature": 2.5, "top_k": 16},
            }
        ),
    )


@pytest.fixture
def config(raw_config):
    return parse(raw_config)


@pytest.fixture
def run(raw_config, sight, tmp_path):
    run = runs.create(tmp_path / "runs", "one", parse(raw_config))
    sights.write(run, sight)
    return run


class Page(HTMLParser):
    """Its tags, its attributes, and what stands in `code` and `pre`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.code, self.depth = [], [], "", 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]
        self.depth += tag in ("code", "pre")

    def handle_endtag(self, tag):
        self.depth -= tag in ("code", "pre")

    def handle_data(self, data):
        self.code += data * bool(self.depth)


def evil_facts():
    """Three tokens for each evil text: as a token, as a candidate, and before one."""
    count = len(EVIL)
    top = [[[text, 0.5], ["b", 0.25]] for text in EVIL]
    said = {"ce": [1.0 + n for n in range(count)], "top": top}
    against = {"kl": [0.1 * n for n in range(count)], "agrees": [n % 2 == 0 for n in range(count)]}
    return {
        "tokens": [{"text": text, "before": text} for text in EVIL],
        "teacher": said,
        "students": {"distilled": said | against},
    }


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.7])
def test_entropy_and_tail_mass_are_those_of_a_plain_softmax(temperature):
    logits = np.random.default_rng(0).normal(0, 4, (5, 37)).astype(np.float32)
    top, ranked = sizes(37, 10), -np.sort(-logits, axis=-1)
    entropy, outside = softened(ranked, temperature, top)
    probs = softmax(ranked, temperature)
    assert entropy == pytest.approx(-(probs * np.log(probs)).sum(-1), rel=1e-5)
    assert outside == pytest.approx(
        np.stack([probs[:, k:].sum(-1) for k in top], axis=-1), rel=1e-4, abs=1e-12
    )
    assert (outside[:, -1] == 0).all()


def test_tokens_that_are_never_said_have_no_share():
    entropy, outside = softened(np.array([[1.0, 1.0, -np.inf, -np.inf]], dtype=np.float32), 2.0, [1, 2, 4])
    assert entropy == pytest.approx([math.log(2)])
    assert outside[0].tolist() == pytest.approx([0.5, 0, 0])


def test_sizes_are_powers_of_two_the_config_s_own_and_the_whole_vocabulary():
    assert sizes(300, 100) == [1, 2, 4, 8, 16, 32, 64, 100, 128, 256, 300]
    assert sizes(300, 1000)[-1] == 300
    assert sizes(256) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert sizes(1) == [1]


def test_the_message_states_the_median_and_names_a_top_k_that_holds_enough():
    table = {
        "sizes": [1, 2, 4],
        "rows": [
            {"temperature": 2.0, "entropy": [1, 1, 1], "outside": [[0.4, 0, 0], [0.5, 0.03, 0], [1, 1, 0]]}
        ],
    }
    assert (
        softening_message(table, 2.0)
        == "At T = 2 the top 2 hold 97 % of the teacher's mass, at the median token"
    )
    assert (
        softening_message(table, 2.0, 1)
        == "At T = 2 the top 1 hold 50 % of the teacher's mass, at the median token"
    )
    assert "the top 4 hold 100 %" in softening_message(table, 2.0, 1000)
    with pytest.raises(KeyError, match="T = 3 is not in the table"):
        softening_message(table, 3.0)


def test_a_top_k_beyond_the_vocabulary_is_all_of_it(sight, raw_config):
    found = softening_of(sight, parse(raw_config | {"loss": {"weights": {"kd": 1.0}, "top_k": 5000}}))
    assert found["top_k"] == 300
    assert "the top 300 hold 100 %" in softening_message(found["softening"], 2.0, found["top_k"])
    assert softening_figure(found["softening"], 2.0, 300)


def test_the_choice_is_the_config_s_as_training_begins(raw_config):
    def of(**loss):
        return chosen(parse(raw_config | {"loss": loss}))

    assert of(weights={"kd": 1.0}, temperature={"linear": [4, 1]}, top_k={"steps": {0: 64, 0.5: 16}}) == (
        4.0,
        64,
    )
    assert of(weights={"reverse_kl": 1.0, "contrastive": 1.0}, temperature={"reverse_kl": 3}) == (3.0, None)
    assert of(weights={"ce": 1.0}) == (2.0, None)


def test_a_sight_holds_what_each_model_says_of_each_token(sight, voices, rows):
    n = 0
    for row in beginnings(rows, 40):
        ids = torch.tensor([row["input_ids"]])
        for name, model in voices.items():
            with torch.no_grad():
                expected = model(input_ids=ids).logits[0, :-1, :300].numpy()
            assert sight.logits[name][n : n + len(expected)] == pytest.approx(expected, abs=1e-4)
        assert sight.targets[n : n + ids.shape[1] - 1].tolist() == ids[0, 1:].tolist()
        assert "".join(sight.texts[n : n + ids.shape[1] - 1]) == sight_text(row, sight)
        assert sight.before[n] == sight.decode(ids[0, 0].item())
        assert set(sight.before[n + 1 : n + ids.shape[1] - 1]) <= {""}
        n += ids.shape[1] - 1
    assert n == len(sight.texts) == 40


def sight_text(row, sight):
    return "".join(sight.decode(token) for token in row["input_ids"][1:])


def test_rows_are_taken_until_there_are_enough_tokens():
    rows = [{"input_ids": list(range(11))}] * 3
    assert [len(row["input_ids"]) for row in beginnings(rows, 5)] == [6]
    assert [len(row["input_ids"]) for row in beginnings(rows, 19)] == [11, 10]
    assert [len(row["input_ids"]) for row in beginnings(rows, 12)] == [11]
    assert [len(row["input_ids"]) for row in beginnings(rows, 500)] == [11, 11, 11]


def test_a_summary_has_each_token_s_figures(sight, facts):
    teacher, student = (softmax(sight.logits[name]) for name in ("teacher", "distilled"))
    each, said = np.arange(len(sight.targets)), facts["students"]["distilled"]
    assert said["kl"] == pytest.approx((teacher * np.log(teacher / student)).sum(-1), abs=2e-5)
    assert said["ce"] == pytest.approx(-np.log(student[each, sight.targets]), abs=2e-5)
    assert facts["teacher"]["ce"] == pytest.approx(-np.log(teacher[each, sight.targets]), abs=2e-5)
    assert said["agrees"] == (teacher.argmax(-1) == student.argmax(-1)).tolist()
    order = np.argsort(-student[7])[:5]
    assert said["top"][7] == [
        [sight.decode(token), pytest.approx(student[7, token], abs=1e-5)] for token in order.tolist()
    ]
    assert facts["softening"]["sizes"] == sizes(300, 16)
    assert [row["temperature"] for row in facts["softening"]["rows"]] == sorted([*TEMPERATURES, 2.5])


def test_students_of_the_same_text_stay_together(run, sight):
    untrained = Predictions(
        sight.texts,
        sight.before,
        sight.targets,
        {"teacher": sight.logits["teacher"], "untrained": sight.logits["baseline"]},
        sight.decode,
    )
    sights.write(run, untrained)
    found = runs.read_json(run.path / "explorers.json")
    assert list(found["students"]) == ["untrained", "distilled", "baseline"]
    other = Predictions(["x", *sight.texts[1:]], sight.before, sight.targets, untrained.logits, sight.decode)
    sights.write(run, other)
    assert list(runs.read_json(run.path / "explorers.json")["students"]) == ["untrained"]


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
    sight = Predictions(EVIL, EVIL, np.arange(len(EVIL)), logits, EVIL.__getitem__)
    page = Page(candidate_bars(sight, 4, 2.0, 4096))
    assert "script" not in page.tags
    assert not [name for name in page.attributes if name.startswith("on")]
    assert all(text in page.code for text in ("<script>alert(1)</script>", "$x^2$", "\\x07", "</style>"))


def test_bars_say_what_lies_outside_and_what_the_student_gives(sight):
    page = candidate_bars(sight, 3, 2.0, 16)
    teacher, student = (probabilities(sight.logits[name][3], 2.0) for name in ("teacher", "distilled"))
    assert teacher == pytest.approx(softmax(sight.logits["teacher"][3], 2.0))
    order = np.argsort(-teacher)[:16]
    assert f"<b>{100 * (1 - teacher[order].sum()):.3g} %</b> of its mass lies outside the top 16" in page
    assert f"the distilled student gives the same tokens {100 * student[order].sum():.3g} %" in page
    assert f"entropy is <b>{-(teacher * np.log(teacher)).sum():.2f} nats</b>" in page
    assert "4 more of the top 16" in page
    assert "<b>0 %</b> of its mass lies outside the top 300" in candidate_bars(sight, 3, 2.0, 100_000)


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


def test_moving_a_slider_redraws_bars_and_picture(sight, config):
    explorer = TemperatureExplorer(sight, config)
    for control, value in ((explorer.temperature, 6.0), (explorer.token, 9), (explorer.top_k, 8)):
        bars, picture = explorer.bars.value, explorer.picture.value
        control.value = value
        assert explorer.bars.value != bars
        assert explorer.picture.value != picture
    assert bytes(explorer.picture.value[:4]) == b"\x89PNG"
    assert "At T = 6 " in explorer.bars.value


def test_the_heat_map_follows_its_controls(facts):
    explorer = HeatMapExplorer(facts)
    for control, value in ((explorer.measure, "ce"), (explorer.student, "baseline"), (explorer.rank, 7)):
        before = explorer.map.value
        control.value = value
        assert explorer.map.value != before
    seventh = hardest(facts, "baseline", "ce")[6]
    assert f"came, token {seventh + 1}<" in explorer.map.value.split("resting")[-1]


def parts(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


def test_with_a_person_there_are_widgets_and_headless_there_are_none(run, sight, monkeypatch):
    def shown():
        return (
            explorers.temperature_and_top_k(sight, run.config),
            explorers.token_heat_map(run),
            explorers.schedule_designer(run),
        )

    monkeypatch.delenv(PARENT, raising=False)
    made = shown()
    assert [type(each) for each in made] == [TemperatureExplorer, HeatMapExplorer, ScheduleDesigner]
    assert not any(isinstance(part, ipywidgets.Output) for each in made for part in parts(each))
    monkeypatch.setenv(PARENT, "test")
    assert [type(each) for each in shown()] == [HTML] * 3


def test_still_pages_need_no_script_and_nothing_from_outside(run):
    pages = still.static_html(run)
    assert list(pages) == ["Temperature and top k", "Token by token", "Schedules of the training"]
    for page in map(Page, pages.values()):
        assert "script" not in page.tags
        assert not {"src", "href", "onclick", "action"} & set(page.attributes) - {"src"}
    assert all(page.count('src="') == page.count('src="data:image/png;base64,') for page in pages.values())
    assert [Page(page).tags.count("img") for page in pages.values()] == [1, 0, 1]
    assert "temperature: 2.0" in pages["Schedules of the training"]
    assert pages["Token by token"].count("kd-heat kl") == 0
    assert pages["Token by token"].count("<details>") == 1


def test_a_run_that_was_not_explored_has_no_pages(raw_config, tmp_path):
    run = runs.create(tmp_path / "runs", "none", parse(raw_config))
    assert still.static_html(run) == {}
    with pytest.raises(RunError, match="has no explorers.json yet; call"):
        explorers.token_heat_map(run)


def test_softening_keeps_quartiles_over_the_tokens(sight):
    (row,) = softening(sight.ranked, [2.0], sizes(300))["rows"]
    probs = -np.sort(-softmax(sight.logits["teacher"], 2.0), axis=-1)
    assert row["entropy"] == pytest.approx(
        np.percentile(-(probs * np.log(probs)).sum(-1), [25, 50, 75]), rel=1e-4
    )
    assert row["outside"][1][3] == pytest.approx(np.median(probs[:, 8:].sum(-1)), rel=1e-4)


def test_the_bench_asks_the_students_that_there_are(raw_config, tmp_path):
    run = runs.create(tmp_path / "runs", "one", parse(raw_config | {"baseline": None}))
    run.add_to_manifest(student_layers=[0, 3])
    sight = Workbench(run).explore("untrained", "baseline")
    assert sight.students == ["untrained"]
    assert len(sight.texts) == TOKENS
    assert len(runs.read_json(run.path / "explorers.json")["tokens"]) == len(sight.texts)
    with pytest.raises(RunError, match="no student 'destilled'; did you mean 'distilled'"):
        Workbench(run).explore("destilled")
