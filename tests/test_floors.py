"""kdlib is a building: a module may import only from lower floors.  Run: pytest tests/test_floors.py"""
import ast
from pathlib import Path

KDLIB = Path(__file__).parent.parent / "kdlib"
FLOORS = [
    {"cpu"},
    {"diagnostics.row_view", "errors", "schedulers", "signals", "strata", "tokens", "calibration", "measures", "resampling",
     "diagnostics.findings"},
    {"answers", "task_rules", "arguments", "curriculum", "fields", "keys", "overrides", "diagnostics.fixes"},
    {"answer_results", "loss_config"},
    {"config"},
    {"losses.divergences"},
    {"diagnostics.token_view", "losses.subset", "losses.features", "losses.workspace", "diagnostics.ledger", "runs", "dialects"},
    {"losses.linear", "captures", "embedded", "migration", "diagnostics.allocations", "metrics", "canvas", "sections"},
    {"batches", "sources", "items"},
    {"data", "labelled", "prompts", "models", "objective", "progress"},
    {"classes", "questions"},
    {"classifiers", "teachers", "callbacks", "checkpoints", "diagnostics.culprits", "diagnostics.gradients"},
    {"diagnostics.nan_guard", "diagnostics.nan_report", "trackers", "tasks", "footprint", "choices"},
    {"guarded_trainer"},
    {"trainer", "compare_classes", "scene", "answer_figures", "answer_tables"},
    {"compare"},
    {"panels"},
    {"training", "plots", "pages", "benchmarks.settings", "benchmarks.machine", "benchmarks.heads", "sweeps.settings", "sweeps.clock",
     "sweeps.crew"},
    {"temperatures", "courses", "heat_map", "compared"},
    {"sights", "candidates", "schedule_designer", "elsewhere"},
    {"explorer_widgets"},
    {"explorers"},
    {"benchmarks.peers", "benchmarks.reading", "diagnostics.scorecard", "diagnostics.parity", "diagnostics.rehearsal", "sweeps.trials",
     "executed", "curves"},
    {"benchmarks.rounds", "benchmarks.steps", "benchmarks.targets", "benchmarks.figures", "diagnostics.charges", "diagnostics.probe",
     "sweeps.reading", "sweeps.search", "summaries", "dashboard"},
    {"diagnostics.forecast", "diagnostics.measurement", "sweeps.axes", "sweeps.gains", "side_by_side", "benchmarks.drawing"},
    {"diagnostics.remedies", "diagnostics.subject", "sweeps.maps"},
    {"diagnostics.outlook", "diagnostics.config_checks", "diagnostics.schedule_checks", "diagnostics.data_checks",
     "diagnostics.model_checks", "diagnostics.class_checks", "diagnostics.question_checks", "sweeps.figures"},
    {"diagnostics.batch_checks", "sweeps.page", "sweeps.cost"},
    {"diagnostics.doctor"},
    {"teacher_stage"},
    {"reports", "overview", "workbench", "benchmarks.study"},
    {"kernels"},
    {"runner", "sweeps.pool"},
    {"sweeps.conduct", "cli_options"},
    {"cli_checks"},
    {"cli"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
READERS = {  # importable without torch
    "answers", "answer_figures", "answer_results", "answer_tables", "calibration", "measures", "resampling",
    "errors", "schedulers", "arguments", "curriculum", "fields", "keys", "overrides", "task_rules", "loss_config", "config", "runs",
    "dialects", "strata",
    "migration", "metrics", "canvas", "progress", "scene", "panels", "plots", "dashboard", "diagnostics.scorecard", "pages", "executed",
    "curves", "sweeps.gains", "compared", "summaries", "side_by_side", "overview", "reports", "runner", "kernels", "tokens",
    "temperatures", "courses", "heat_map", "candidates", "schedule_designer", "explorer_widgets", "explorers",
    "benchmarks.settings", "benchmarks.reading", "benchmarks.drawing", "benchmarks.targets", "benchmarks.figures",
    "diagnostics.findings", "diagnostics.fixes", "diagnostics.row_view",
    "sweeps.settings", "sweeps.trials", "sweeps.reading", "sweeps.axes", "sweeps.maps", "sweeps.figures", "sweeps.page", "sweeps.clock",
    "sweeps.crew", "sweeps.search", "sweeps.pool", "cli_options", "cli_checks", "cli",
}


def modules():
    for path in sorted(KDLIB.rglob("*.py")):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(KDLIB).with_suffix("").parts), path


def imports(path: Path) -> set[str]:
    """Absolute dotted names this file imports; `from kdlib import data` counts as kdlib.data."""
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
    heavy = {name for name, path in modules() if name in READERS
             for target in imports(path) if target.split(".")[0] in {"torch", "transformers"}}
    assert not heavy, f"{heavy} must work from metrics.jsonl alone"


def test_no_file_passes_300_lines():
    long = {name: n for name, path in modules() if (n := len(path.read_text().splitlines())) > 300}
    assert not long, f"split by noun: {long}"
