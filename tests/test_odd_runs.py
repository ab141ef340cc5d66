"""Runs whose files are missing, torn or another program's: readers still make pages, or say what to do."""

import json
import re

import pytest
from made_log import evaluated, logged
from made_runs import made_run, results

from kdlib.errors import RunError
from kdlib.plots.training import dashboard, run_figures
from kdlib.plots.training_panels import View
from kdlib.reports import explorers as still, index, run as reports
from kdlib.reports.scorecard import scorecard
from kdlib.reports.summary import summary
from kdlib.runs.files import write_json
from kdlib.runs.log import Tail, cut_metrics, history
from kdlib.runs.progress import headline, held_out_line, progress, where_line
from kdlib.sweeps.results import Sweep, trial_table
from kdlib.workbench import dashboard as live, explorers
from kdlib.workbench.cli import main


def lines(*each) -> str:
    return "".join(json.dumps(line) + "\n" for line in each)


def without(line, *names):
    return {name: value for name, value in line.items() if name.removeprefix("train/") not in names}


NAN = float("nan")
READ = {
    "absent": None,
    "empty": "",
    "blank": " \n\n",
    "half a line": '{"train/step": 1, "tra',
    "one train line": lines(logged(1)),
    "one evaluation": lines(evaluated(5)),
    "evaluations alone": lines(evaluated(5), evaluated(10)),
    "train lines alone": lines(*map(logged, range(1, 11))),
    "null": lines(logged(1), logged(2, kd_loss=None), evaluated(2, kl_to_teacher=None)),
    "null throughout": lines(logged(1, kd_loss=None, tokens_per_s=None)),
    "no loss": lines(logged(1, loss=None), evaluated(1, loss=None)),
    "nan": lines(
        logged(1, loss=NAN, kd_loss=NAN, ce_loss=NAN, grad_norm=NAN), evaluated(1, kl_to_teacher=NAN)
    ),
    "no terms": lines({"train/step": 1, "train/epoch": 0.1, "train/loss": 1.0}),
    "a weight alone": lines(logged(1, other_weight=1.0)),
    "few settings": lines(without(logged(1), "temperature", "learning_rate", "grad_norm")),
    "times that are none": lines(*({**logged(n), "time": "then"} for n in (1, 2, 3))),
    "steps that fall": lines(logged(5), logged(1), {**logged(1), "train/step": -3}),
}
REFUSED = {
    "text": (lines(logged(1), logged(2, kd_loss="low")), "changed from number to string"),
    "text throughout": (lines(logged(1, loss="low")), "train/loss is of type string"),
    "a date": (lines(logged(1, loss="2026-01-01T00:00:00")), "train/loss is of type timestamp"),
    "nested": (lines(logged(1, kd_loss={"a": 1})), "train/kd_loss is of type struct"),
    "an array": (lines(logged(1, kd_loss=[1.0])), "train/kd_loss is of type list"),
    "true": (lines(logged(1, loss=True)), "train/loss is of type bool"),
    "text of an evaluation": (
        lines(logged(1), evaluated(1, perplexity="x")),
        "eval/perplexity is of type string",
    ),
    "no step": (lines(logged(1), without(logged(2), "step")), "train/step is missing"),
    "half a step": (lines({**logged(1), "train/step": 1.5}), "train/step is no whole number"),
    "no epoch": (lines(without(logged(1), "epoch")), "train/epoch is missing"),
    "another program's": ('{"epoch": 1, "loss": 2.0}\n', "train/step is missing"),
    "nothing in it": ("{}\n", "train/step is missing"),
    "a log in words": ("INFO training started\n", "Invalid value"),
    "a table": ("step,loss\n1,2.0\n", "Invalid value"),
    "lists": ("[1, 2]\n", "changed from object to array"),
    "null as a line": ("null\n", "JSON"),  # of which pyarrow's own reader dies, and the kernel with it
    "null between lines": (lines(logged(1)) + "null\n" + lines(logged(2)), "JSON"),
    "zeros of a power cut": (lines(logged(1)) + "\0" * 50 + "\n", "JSON"),
    "torn in the middle": (lines(logged(1)) + '{"train/st' + lines(logged(2)), "JSON"),
    "a name twice": ('{"train/step": 1, "train/step": 2}\n', "twice"),
}


@pytest.fixture
def with_log(tmp_path):
    def make(text, *, planned=False):
        run = made_run(tmp_path / "runs", "odd", kl=None, steps=0)
        if text is not None:
            run.metrics.write_text(text)
        if planned:
            write_json(run.plan, [{"step": n, "learning_rate": 1e-4, "kd_weight": 0.7} for n in (1, 20)])
        return run

    return make


@pytest.mark.parametrize("planned", [False, True], ids=["no plan", "a plan"])
@pytest.mark.parametrize("text", READ.values(), ids=READ)
def test_every_reader_takes_a_log_that_says_little(with_log, text, planned):
    run = with_log(text, planned=planned)
    now = progress(run)
    assert all(isinstance(words, str) for words in (headline(now), where_line(now), held_out_line(now)))
    assert now.steps >= 1
    for view in (View(), View(terms=(), smoothing=0.3, steps=(3, 4))):
        dashboard(now, view, [now])
    assert {line.result for line in scorecard(run)} <= {"pass", "fail", "not measured"}
    assert summary(run).state == "done"
    assert set(run_figures(run, None)) <= {"dashboard", "learning_curves"}
    assert live.LiveRun(run, View()).scorecard() == scorecard(run)
    assert len(history(run)) <= 2


@pytest.mark.parametrize("name", ["absent", "one train line", "one evaluation", "no terms"])
def test_of_a_log_that_says_little_pages_are_made(with_log, tmp_path, monkeypatch, name):
    run, root = with_log(READ[name]), str(tmp_path / "runs")
    monkeypatch.setattr("sys.argv", ["kd", "report", "odd", "--runs", root, "--reports", str(tmp_path / "r")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    assert "max_length: 16" in (tmp_path / "r" / "odd" / "report.html").read_text()
    assert ">odd<" in (tmp_path / "r" / "index.html").read_text()
    assert live.LiveRun(run, View()).png()[1:4] == b"PNG"


@pytest.mark.parametrize(("text", "why"), REFUSED.values(), ids=REFUSED)
def test_a_log_of_something_else_is_refused_with_what_to_do(with_log, text, why):
    run = with_log(text)
    for reader in (
        Tail,
        progress,
        scorecard,
        lambda run: run_figures(run, None),
        lambda run: live.LiveRun(run, View()),
    ):
        with pytest.raises(
            RunError, match=rf"metrics.jsonl: found a line .*{why}.*each is an object.*; delete it"
        ):
            reader(run)
    assert why in summary(run).message.replace("\n", " ")


@pytest.mark.parametrize("read", [history, lambda run: cut_metrics(run, 1)], ids=["history", "cut"])
@pytest.mark.parametrize("text", ["INFO started", "null", '{"loss": 1}', "[1]", "[" * 5000 + "]" * 5000])
def test_a_training_does_not_go_on_from_a_log_of_something_else(with_log, text, read):
    with pytest.raises(RunError, match=r"metrics.jsonl: found a line .*; delete it"):
        read(with_log(f"{text}\n"))


WHOLE = results()
COMPARISONS = {
    "torn": ('{"models": ', "comparison_results.json: found no JSON"),
    "the teacher alone": (
        {**WHOLE, "models": {"teacher": WHOLE["models"]["teacher"]}},
        "found no comparison",
    ),
    "the student alone": (
        {**WHOLE, "models": {"distilled": WHOLE["models"]["distilled"]}},
        "found no comparison",
    ),
    "no differences": ({**WHOLE, "differences": []}, "found no comparison"),
    "no difference to one": (
        {**WHOLE, "differences": [d for d in WHOLE["differences"] if d["against"] != "baseline"]},
        "found no difference of distilled and baseline in",
    ),
    "a list": ([1], "found no comparison"),
}


@pytest.mark.parametrize(("content", "why"), COMPARISONS.values(), ids=COMPARISONS)
def test_a_comparison_that_is_none_is_named_on_every_page(with_log, tmp_path, content, why):
    run = with_log(READ["train lines alone"])
    text = content if isinstance(content, str) else json.dumps(content)
    (run.path / "comparison_results.json").write_text(text)
    assert why in summary(run).message
    page = reports.render(run, tmp_path / "reports").read_text()
    assert "cannot be read whole" in page
    assert why in page
    assert str(tmp_path) not in page.split('id="config"')[0]
    assert why in index.render_index(run.path.parent, tmp_path / "reports").read_text()


@pytest.mark.parametrize("content", ["{}", "null"])
def test_an_empty_comparison_is_none_yet(with_log, tmp_path, content):
    run = with_log(READ["one train line"])
    (run.path / "comparison_results.json").write_text(content)
    assert run.comparison is None
    assert summary(run).state == "done"


@pytest.mark.parametrize("content", ["", '{"models": ', "[1]", '{"models": {"distilled": {}}}'])
def test_a_sweep_names_the_trial_whose_comparison_is_none(with_log, content):
    run = with_log(None)
    (run.path / "comparison_results.json").write_text(content)
    sweep = Sweep(run.path.parent / "swept")
    sweep.path.mkdir()
    trials = [{"run": "odd", "parameters": {"seed": 1}}]
    write_json(
        sweep.path / "sweep.json", {"metric": "perplexity", "parameters": {"seed": [1]}, "trials": trials}
    )
    with pytest.raises(RunError, match="odd/comparison_results.json: found no"):
        trial_table(sweep)


@pytest.mark.parametrize(
    "content", ["", '{"soft', "3", "[1]", '{"students": {}}', '{"softening": {}, "tokens": []}']
)
def test_explorers_that_hold_nothing_say_so_in_their_place(with_log, content):
    run = with_log(None)
    (run.path / "explorers.json").write_text(content)
    (page,) = still.static_html(run).values()
    assert re.match("<p>explorers.json: found no .*(delete it|make it again)", page)
    with pytest.raises(RunError, match="explorers.json: found no"):
        explorers.token_heat_map(run)


@pytest.mark.parametrize("content", ["{}", "null"])
def test_empty_explorers_are_none_yet(with_log, content):
    run = with_log(None)
    (run.path / "explorers.json").write_text(content)
    assert still.static_html(run) == {}
    with pytest.raises(RunError, match="has no explorers.json yet"):
        explorers.token_heat_map(run)
