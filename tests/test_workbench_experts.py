"""A run whose teacher is a mixture of experts: 04_student_aware, after the others, and in the report."""

from contextlib import nullcontext

import nbformat
import pytest
from made_runs import run_cells
from test_routing_use import moe
from transformers import AutoTokenizer

from kdlib.config.run import parse
from kdlib.reports import run as reports
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run, project_root
from kdlib.workbench import runner, session


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, teacher_folder) -> str:
    """Two layers of four experts, of which two are asked, with the tiny teacher's tokenizer."""
    folder = tmp_path_factory.mktemp("experts")
    moe(vocabulary=320).save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(raw_config, teacher, teacher_folder, tmp_path) -> Run:
    raw_config["student"] = {"from": str(teacher_folder)}
    raw_config["training"] |= {"max_steps": 4, "eval_steps": 2, "save_steps": 4, "logging_steps": 1}
    raw_config["teacher"]["model"] = teacher
    raw_config["compare"]["continuations"] = 0
    raw_config["baseline"] = None
    return runs.create(tmp_path / "runs", "first", parse(raw_config))


def test_a_run_with_experts_shows_who_spoke_in_its_notebook_and_its_report(run, tmp_path):
    bench = session.Workbench(run)
    bench.setup()
    assert run.manifest["experts"] == {"layers": 2, "each": 4, "asked": 2}
    bench.train()
    bench.compare()
    found = run_cells(runner.EXPERTS, run)["found"]
    assert found == runs.read_json(run.path / "experts.json")
    assert found["tokens"] == run.comparison["tokens"]  # all of these few rows
    assert {path.name for path in (run.path / "experts").iterdir()} >= {
        "experts_by_token.png",
        "experts_by_layer.csv",
    }
    page = reports.render(run, tmp_path / "reports")
    text = page.read_text()
    assert 'id="experts"' in text
    assert "times an even load" in text
    assert (page.parent / "figures" / "experts_by_layer.png").exists()
    assert (page.parent / "tables" / "experts_by_token.csv").exists()


def test_a_dense_teacher_is_told_from_it_and_nothing_stops(raw_config, tmp_path, capsys):
    dense = runs.create(tmp_path / "runs", "dense", parse(raw_config))
    session.Workbench(dense).setup()
    assert "experts" not in dense.manifest
    assert run_cells(runner.EXPERTS, dense)["figures"] == {}
    assert "has no experts: a dense model asks all of itself" in capsys.readouterr().out
    assert 'id="experts"' not in reports.render(dense, tmp_path / "reports").read_text()
    alone = {**raw_config, "teacher": None, "loss": {"weights": {"ce": 1.0}}, "baseline": None}
    alone["student"] = {"from": raw_config["teacher"]["model"]}
    assert session.Workbench(runs.create(tmp_path / "runs", "alone", parse(alone))).experts() == {}


class NoKernels:
    def __init__(self):
        self.others = []

    def taken(self, *, another):
        self.others.append(another)
        return nullcontext()


@pytest.mark.parametrize("has_experts", [True, False])
def test_it_runs_after_the_others_where_the_setup_found_experts(run, monkeypatch, has_experts):
    done, kernels = [], NoKernels()

    def execute(notebook, output, parameters, kernel):
        done.append(notebook.stem)
        if notebook.stem == "00_setup" and has_experts:
            run.add_to_manifest(experts={"layers": 2, "each": 4, "asked": 2})

    monkeypatch.setattr(runner, "execute", execute)
    runner.run_notebooks(run, {}, kernels, lambda run: run.path)
    assert done == [*runner.NOTEBOOKS, *[runner.EXPERTS] * has_experts]
    assert kernels.others == [True] * (len(done) - 1) + [False]  # none is started for nothing
    assert runner.without([runner.EXPERTS]) == runner.NOTEBOOKS


@pytest.mark.slow
def test_papermill_runs_it(run):
    session.Workbench(run).setup()
    copy = run.notebooks / "04_student_aware.ipynb"
    given = {"config": "configs/quickstart.yaml", "run": str(run.path)}
    runner.execute(project_root() / "notebooks" / copy.name, copy, given)
    outputs = [o for cell in nbformat.read(copy, as_version=4).cells for o in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2  # all of it is prose
    assert "error" not in {output.output_type for output in outputs}
