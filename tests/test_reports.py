import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kdlib import metrics, plots, reports, runs
from kdlib.config import parse
from kdlib.runs import Run

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">]]>'


def interval(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def results(distilled_kl=1.0, text="fine"):
    metrics = ("perplexity", "bits_per_byte", "kl_to_teacher", "agreement", "accuracy")
    facts = {"parameters": 10**6, "size_on_disk_gib": 0.1, "forward_tokens_per_s": 100.0, "peak_memory_gib": 0.2}
    models = {name: {**{m: interval(1.5) for m in metrics}, **facts} for name in ("teacher", "untrained", "baseline", "distilled")}
    differences = [{"model": "distilled", "against": other, "metric": m, **interval(distilled_kl - 1.5 if m == "kl_to_teacher" else 0.3)}
                   for other in ("teacher", "untrained", "baseline") for m in metrics]
    return {"models": models, "differences": differences, "rows": 8, "tokens": 100, "resamples": 100, "interval": "95 %",
            "prompts": [text], "samples": {name: [text] for name in models}}


@pytest.fixture
def run(raw_config, tmp_path) -> Run:
    run = runs.create(tmp_path / "runs", "first", parse(raw_config))
    for folder in (run, run.baseline):
        folder.path.mkdir(exist_ok=True)
        for step in (2, 4, 6):
            at = {"train/step": step, "train/epoch": step / 10}
            terms = {"train/kd_loss": 4 / step, "train/kd_weight": 0.7, "train/ce_loss": 2.0, "train/ce_weight": 0.3}
            rest = {"train/temperature": 2.0, "train/learning_rate": 1e-4 * step, "train/grad_norm": 1.0}
            metrics.append_metrics(folder, {**at, "train/loss": 0.7 * 4 / step + 0.6, **terms, **rest})
            metrics.append_metrics(folder, {**at, "eval/loss": 2.0, "eval/kl_to_teacher": 3 / step})
    runs.write_json(run.path / "comparison_results.json", results())
    run.add_to_manifest(formula="loss = 0.7·T²·KL + 0.3·CE", seed=0, versions={"torch": "2.13.0"}, command="kd run x.yaml")
    run.set_status("done")
    return run


def test_a_report_is_one_file_that_asks_for_nothing_outside(run, tmp_path):
    page = reports.render(run, tmp_path / "reports").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//|file:|/)""", page)
    assert "<script" not in page
    for expected in ("loss = 0.7·T²·KL + 0.3·CE", "max_length: 16", "2.13.0", "kd run x.yaml", "distilled student", "state done"):
        assert expected in page
    folder = tmp_path / "reports" / "first"
    assert {p.name for p in (folder / "figures").iterdir()} == {
        "dashboard.png", "closeness.png", "teacher_student_comparison.png"}
    assert {p.stem for p in (folder / "tables").iterdir()} == {
        "metrics", "evaluation", "quality", "cost", "differences", "scorecard"}


def test_text_from_data_and_models_stays_text(run, tmp_path):
    runs.write_json(run.path / "comparison_results.json", results(text=EVIL))
    run.add_to_manifest(note=EVIL)
    run.set_status("failed", EVIL)
    said = [new_output("stream", name="stdout", text=EVIL), new_output("error", ename="E", evalue=EVIL, traceback=[EVIL])]
    cells = [new_markdown_cell("# A question"), new_code_cell("print(x)", outputs=said)]
    nbformat.write(new_notebook(cells=cells), run.notebooks / "00_setup.ipynb")
    page = reports.render(run, tmp_path / "reports").read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 6
    assert "<details class=\"code\">" in page


def test_a_report_of_a_failed_run_shows_what_there_is(raw_config, tmp_path):
    run = runs.create(tmp_path / "runs", "broken", parse(raw_config))
    run.set_status("failed", "02_train: OutOfMemoryError")
    page = reports.render(run, tmp_path / "reports").read_text()
    assert "02_train: OutOfMemoryError" in page
    assert "This report is partial" in page


def test_the_index_lists_every_run_with_its_state(run, raw_config, tmp_path):
    runs.create(tmp_path / "runs", "second", parse(raw_config)).set_status("failed", "x")
    reports.render(run, tmp_path / "reports")
    page = reports.render_index(tmp_path / "runs", tmp_path / "reports").read_text()
    assert 'href="first/report.html"' in page
    assert "second" in page
    assert page.count('class="state failed"') == 1
    assert page.count('class="state done"') == 1


def test_the_message_says_better_worse_or_no_clear_difference():
    assert "shows: better KL to the teacher (-0.500 [-0.600, -0.400])" in plots.comparison_message(results(distilled_kl=1.0))
    assert "worse KL to the teacher" in plots.comparison_message(results(distilled_kl=2.0))
    assert "no clear difference in KL to the teacher" in plots.comparison_message(results(distilled_kl=1.5))


def test_figures_have_three_digits_and_their_interval():
    assert plots.with_interval({"value": 0.42, "low": 0.3961, "high": 0.441}) == "0.420 [0.396, 0.441]"
    assert plots.with_interval({"value": -1234.5, "low": -2000.0, "high": 534.2}, "+") == "-1,234 [-2,000, +534]"
