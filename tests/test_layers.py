"""kdlib is a building of layers: a package imports only from layers below it.

Run: pytest tests/test_layers.py
"""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

KDLIB = Path(__file__).parent.parent / "kdlib"
LAYERS = [  # from the ground up; benchmarks stand on top, and nothing imports them
    {"errors", "schedulers", "metrics"},
    {"config", "hardware", "tokens"},
    {"losses", "runs", "prompts", "code", "sources", "questions", "migration"},
    {"data", "models", "plots", "filters"},
    {"routing", "students", "cache"},
    {"tasks", "training", "reports", "generation"},
    {"evaluation", "diagnostics", "sweeps"},
    {"workbench"},
    {"benchmarks"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
TORCH_FREE = {
    *("errors", "schedulers", "metrics", "config", "runs", "plots", "reports", "sweeps"),
    *("prompts", "filters", "generation", "code", "migration"),
}
MODULES = {
    ".".join(path.relative_to(KDLIB).with_suffix("").parts): path
    for path in sorted(KDLIB.rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
}


@cache
def imported(module: str) -> frozenset[str]:
    """The modules of kdlib that a module imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: write `from kdlib…`, not a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return frozenset({name.removeprefix("kdlib.") for name in found} & MODULES.keys())


@cache
def chain(module: str) -> tuple[str, ...]:
    """The longest chain of imports from a module down."""
    return (module, *max((chain(below) for below in imported(module)), key=len, default=()))


def package(module: str) -> str:
    return module.split(".")[0]


def test_imports_only_go_down():
    up = [
        f"{module} imports {other}"
        for module in MODULES
        for other in imported(module)
        if package(other) != package(module) and LAYER_OF[package(other)] >= LAYER_OF[package(module)]
    ]
    assert not up, "\n".join(up)


def test_torch_free_packages_load_no_torch():
    names = [f"kdlib.{module}" for module in MODULES if package(module) in TORCH_FREE]
    code = (
        "import sys, importlib\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_chain_of_imports_is_longer_than_ten():
    longest = max(map(chain, MODULES), key=len)
    assert len(longest) <= 10, " → ".join(longest)


def test_no_package_has_more_than_nine_files():
    crowded = {name: n for name, n in Counter(map(package, MODULES)).items() if n > 9}
    assert not crowded


def test_no_file_passes_300_lines():
    long = {module: n for module, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 300}
    assert not long, f"split by noun: {long}"
