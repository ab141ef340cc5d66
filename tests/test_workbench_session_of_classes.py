"""What the notebooks show of a classification: shapes, a row, the classes' distributions, rows in
colours, accuracy while it trains.
"""

import json

import pytest
import yaml
from made_classifiers import LABELS, classification, classifier, source, taught
from matplotlib.text import Text

from kdlib.plots.tokens import RowView, candidate_bars, heat_map
from kdlib.plots.training import run_figures
from kdlib.reports import explorers
from kdlib.reports.summary import summary
from kdlib.runs import folder as runs, log as metrics
from kdlib.runs.progress import held_out_line, progress
from kdlib.workbench import session
from kdlib.workbench.explorers import HeatMapExplorer, TemperatureExplorer


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> session.Workbench:
    """A run of a tiny classification, set up, tried and trained."""
    folder = tmp_path_factory.mktemp("views")
    teacher = taught(folder / "teacher", "llama", labels=["weather", "tools", "animals"])
    student = classifier(folder / "student", "bert", labels=["one", "two"], tokens=280, seed=1)
    raw = classification(teacher, student, max_steps=6, learning_rate=3e-3)
    raw |= {
        "data": {"source": source(folder), "validation": 0.2, "max_length": 32},
        "baseline": {"weights": {"ce": 1.0}},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    made = session.open_run(str(folder / "tiny.yaml"), str(folder / "run"), new=True)
    made.setup_table = made.setup()
    made.dry_table = made.dry_run()
    made.train()
    made.train_baseline()
    return made


def test_the_setup_names_the_classes_with_their_rows(bench):
    said = bench.setup_table.loc["classes"].item()
    assert said.startswith("3, with their rows (train / validation): animals ")
    assert "a tokenizer of its own" in said
    assert bench.run.manifest["data"]["train_classes"].keys() == set(LABELS)


def test_shapes_are_of_rows_and_of_each_models_own_tokens(bench):
    table = bench.shapes()
    assert table.loc["kept rows N"].tolist() == [2, 2]
    assert table.loc["logits [N, V]"].tolist() == [[2, 3], [2, 3]]
    assert table.loc["input_ids [B, T]", "teacher"] != table.loc["input_ids [B, T]", "student"]


def test_the_example_is_a_row_with_its_class_and_what_the_teacher_says(bench):
    view = bench.example()
    assert isinstance(view, RowView)
    assert view.text == bench.prepared.train[0]["text"]
    assert view.label == bench.prepared.labels[bench.prepared.train[0]["label"]]
    assert [name for name, _ in view.said] == sorted(LABELS)
    assert sum(p for _, p in view.said) == pytest.approx(1, abs=1e-5)
    assert f"class: {view.label}" in str(view)


def test_a_row_view_escapes_its_text_and_sums_up_many_classes():
    view = RowView("<b>&", "c3", [(f"c{number}", 0.05) for number in range(20)])
    assert "&lt;b&gt;&amp;" in view._repr_html_()
    assert view.lines[-1] == ("12 others", pytest.approx(0.6))


def test_the_dry_run_shows_every_term(bench):
    assert {"kd, nats", "ce, nats", "loss", "T", "learning rate"} <= set(bench.dry_table.columns)


def test_the_explorers_show_classes_and_rows(bench, monkeypatch):
    monkeypatch.setattr(runs, "headless", lambda: True)
    predictions = bench.explore("distilled", "baseline", "untrained")
    assert predictions.of == "rows"
    assert predictions.logits["teacher"].shape == (32, 3)
    assert set(predictions.students) == {"distilled", "baseline", "untrained"}
    facts = json.loads((bench.run.path / "explorers.json").read_text())
    assert facts["of"] == "rows"
    assert {name for name, _ in facts["teacher"]["top"][0]} == set(LABELS)
    page = explorers.static_html(bench.run)
    assert list(page) == ["Temperature and top k", "Row by row", "Schedules of the training"]
    assert "32 rows" in page["Row by row"]
    assert "the likeliest class holds" in page["Temperature and top k"]
    assert "at the median row" in page["Temperature and top k"]
    assert (
        "·"
        not in heat_map(facts, "distilled").split('<code class="text">')[1].split('<span class="card">')[0]
    )


def test_the_widgets_are_of_rows(bench):
    predictions = bench.explore("distilled")
    widget = TemperatureExplorer(predictions, bench.config)
    assert widget.token.description == "row"
    widget.token.value, widget.temperature.value = 5, 4.0
    bars = candidate_bars(predictions, 4, 2.0, 3)
    assert all(label in bars for label in LABELS)
    assert "gives the same classes" in bars
    facts = json.loads((bench.run.path / "explorers.json").read_text())
    assert HeatMapExplorer(facts).rank.description == "hardest row"


def test_held_out_figures_are_those_of_a_classification(bench):
    now = progress(bench.run)
    assert now.of == "row"
    line = held_out_line(now)
    assert line.startswith("held-out: accuracy ")
    assert "log-loss" in line
    assert "perplexity" not in line
    assert set(summary(bench.run).keys) == {"accuracy", "macro_f1", "log_loss"}
    assert "training, rows/s" in summary(bench.run).costs
    assert "rows_per_s" in metrics.training_table(bench.run)


def test_the_dashboard_is_in_nats_per_row(bench):
    figure = run_figures(bench.run, None)["dashboard"]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert "nats per row" in labels
    assert not any("token" in label for label in labels)
    words = [text.get_text() for text in figure.findobj(Text)]
    assert any("rows per second" in text for text in words)
