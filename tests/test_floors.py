"""kdlib is a building: a module may import only from lower floors.  Run: pytest tests/test_floors.py"""

import ast
from pathlib import Path

KDLIB = Path(__file__).parent.parent / "kdlib"
FLOORS = [
    {"hardware"},
    {
        "plots.row_view",
        "errors",
        "schedulers",
        "losses.signals",
        "data.strata",
        "plots.visible",
        "metrics.calibration",
        "metrics.names",
        "metrics.bootstrap",
        "diagnostics.findings",
    },
    {
        "metrics.classification",
        "config.task_rules",
        "config.training_arguments",
        "curriculum",
        "config.base",
        "keys",
        "config.overrides",
        "diagnostics.fixes",
    },
    {"metrics.paired", "config.loss"},
    {"config.run"},
    {"losses.divergences"},
    {
        "plots.token_view",
        "losses.subset",
        "losses.features",
        "losses.buffers",
        "losses.ledger",
        "runs.folder",
        "config.dialects",
    },
    {
        "losses.chunked",
        "models.hooks",
        "models.embedded",
        "config.imports",
        "diagnostics.allocations",
        "runs.log",
        "plots.axes",
        "data.sections",
    },
    {"data.batches", "data.sources", "data.qa_rows"},
    {
        "data.text",
        "data.labelled_rows",
        "data.prompts",
        "models.loading",
        "losses.objective",
        "runs.progress",
    },
    {"data.classification", "data.qa"},
    {
        "models.classifier",
        "models.teacher",
        "training.callbacks",
        "training.checkpoints",
        "training.culprits",
        "training.gradients",
    },
    {
        "training.nan_guard",
        "training.nan_report",
        "training.trackers",
        "tasks.base",
        "models.efficiency",
        "tasks.question_answering",
    },
    {"training.guarded_trainer"},
    {
        "training.trainer",
        "tasks.classification",
        "plots.training_panels",
        "plots.classification",
        "plots.answer_tables",
    },
    {"evaluation.compare"},
    {"plots.training"},
    {
        "training.run",
        "plots.comparison",
        "reports.html",
        "benchmarks.settings",
        "benchmarks.machine",
        "benchmarks.heads",
        "sweeps.config",
        "sweeps.clock",
        "sweeps.processes",
    },
    {"plots.softening", "plots.schedules", "plots.tokens", "reports.compared"},
    {"evaluation.predictions", "plots.candidates", "plots.schedule_designer", "evaluation.elsewhere"},
    {"workbench.explorers"},
    {"reports.explorers"},
    {
        "benchmarks.peers",
        "benchmarks.reading",
        "reports.scorecard",
        "diagnostics.parity",
        "diagnostics.fake_step",
        "sweeps.trials",
        "reports.notebook_html",
        "reports.curves",
    },
    {
        "benchmarks.rounds",
        "benchmarks.steps",
        "benchmarks.targets",
        "benchmarks.figures",
        "diagnostics.charges",
        "diagnostics.probe",
        "sweeps.results",
        "sweeps.search",
        "reports.summary",
        "workbench.dashboard",
    },
    {
        "diagnostics.memory",
        "diagnostics.measurement",
        "sweeps.axes",
        "sweeps.gains",
        "reports.side_by_side",
        "benchmarks.drawing",
    },
    {"diagnostics.remedies", "diagnostics.context", "sweeps.maps"},
    {
        "diagnostics.outlook",
        "diagnostics.config_checks",
        "diagnostics.schedule_checks",
        "diagnostics.data_checks",
        "diagnostics.model_checks",
        "diagnostics.class_checks",
        "diagnostics.question_checks",
        "sweeps.figures",
    },
    {"diagnostics.batch_checks", "sweeps.report", "sweeps.cost"},
    {"diagnostics.doctor"},
    {"workbench.teacher_stage"},
    {"reports.run", "reports.index", "workbench.session", "benchmarks.study"},
    {"workbench.kernels"},
    {"workbench.runner", "sweeps.pool"},
    {"sweeps.run", "workbench.cli_options"},
    {"workbench.cli_checks"},
    {"workbench.cli"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
READERS = {  # importable without torch
    "metrics.classification",
    "plots.classification",
    "metrics.paired",
    "plots.answer_tables",
    "metrics.calibration",
    "metrics.names",
    "metrics.bootstrap",
    "errors",
    "schedulers",
    "config.training_arguments",
    "curriculum",
    "config.base",
    "keys",
    "config.overrides",
    "config.task_rules",
    "config.loss",
    "config.run",
    "runs.folder",
    "config.dialects",
    "data.strata",
    "config.imports",
    "runs.log",
    "plots.axes",
    "runs.progress",
    "plots.training_panels",
    "plots.training",
    "plots.comparison",
    "workbench.dashboard",
    "reports.scorecard",
    "reports.html",
    "reports.notebook_html",
    "reports.curves",
    "sweeps.gains",
    "reports.compared",
    "reports.summary",
    "reports.side_by_side",
    "reports.index",
    "reports.run",
    "workbench.runner",
    "workbench.kernels",
    "plots.visible",
    "plots.softening",
    "plots.schedules",
    "plots.tokens",
    "plots.candidates",
    "plots.schedule_designer",
    "workbench.explorers",
    "reports.explorers",
    "benchmarks.settings",
    "benchmarks.reading",
    "benchmarks.drawing",
    "benchmarks.targets",
    "benchmarks.figures",
    "diagnostics.findings",
    "diagnostics.fixes",
    "plots.row_view",
    "sweeps.config",
    "sweeps.trials",
    "sweeps.results",
    "sweeps.axes",
    "sweeps.maps",
    "sweeps.figures",
    "sweeps.report",
    "sweeps.clock",
    "sweeps.processes",
    "sweeps.search",
    "sweeps.pool",
    "workbench.cli_options",
    "workbench.cli_checks",
    "workbench.cli",
}


def modules():
    for path in sorted(KDLIB.rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            yield ".".join(path.relative_to(KDLIB).with_suffix("").parts), path


def imports(path: Path) -> set[str]:
    """Absolute dotted names this file imports; `from kdlib.data import text as data` counts as
    kdlib.data.text.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write `from kdlib...`, not a relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_only_go_down():
    uphill = []
    for name, path in modules():
        assert name in FLOOR_OF, f"kdlib.{name} has no floor; add it to FLOORS"
        for target in imports(path):
            target = target.removeprefix("kdlib.")
            if target in FLOOR_OF and FLOOR_OF[target] >= FLOOR_OF[name]:
                uphill.append(f"{name} (floor {FLOOR_OF[name]}) imports {target} (floor {FLOOR_OF[target]})")
    assert not uphill, "\n".join(uphill)


def test_readers_never_import_torch():
    heavy = {
        name
        for name, path in modules()
        if name in READERS
        for target in imports(path)
        if target.split(".")[0] in {"torch", "transformers"}
    }
    assert not heavy, f"{heavy} must work from metrics.jsonl alone"


def test_no_file_passes_430_lines():
    long = {name: n for name, path in modules() if (n := len(path.read_text().splitlines())) > 430}
    assert not long, f"split by noun: {long}"
