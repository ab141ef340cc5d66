import ipywidgets
import pytest
from IPython.display import HTML
from made_predictions import Page

from kdlib.config.run import parse
from kdlib.errors import RunError
from kdlib.evaluation import predictions as evaluation
from kdlib.plots.tokens import hardest
from kdlib.reports import explorers as still
from kdlib.runs import folder as runs
from kdlib.runs.processes import PARENT
from kdlib.tasks.language_modeling import TOKENS
from kdlib.workbench import explorers
from kdlib.workbench.explorers import HeatMapExplorer, ScheduleDesigner, TemperatureExplorer
from kdlib.workbench.session import Workbench


@pytest.fixture
def config(raw_config):
    return parse(raw_config)


@pytest.fixture
def run(raw_config, predictions, tmp_path):
    run = runs.create(tmp_path / "runs", "one", parse(raw_config))
    evaluation.write(run, predictions)
    return run


def test_moving_a_slider_redraws_bars_and_picture(predictions, config):
    explorer = TemperatureExplorer(predictions, config)
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


def test_with_a_person_there_are_widgets_and_headless_there_are_none(run, predictions, monkeypatch):
    def shown():
        return (
            explorers.temperature_and_top_k(predictions, run.config),
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


def test_the_bench_asks_the_students_that_there_are(raw_config, tmp_path):
    run = runs.create(tmp_path / "runs", "one", parse(raw_config | {"baseline": None}))
    run.add_to_manifest(student_layers=[0, 3])
    predictions = Workbench(run).explore("untrained", "baseline")
    assert predictions.students == ["untrained"]
    assert len(predictions.texts) == TOKENS
    assert len(runs.read_json(run.path / "explorers.json")["tokens"]) == len(predictions.texts)
    with pytest.raises(RunError, match="no student 'destilled'; did you mean 'distilled'"):
        Workbench(run).explore("destilled")
