"""What the benchmark notebook calls: one study, opened; each measurement is added to its
benchmark_results.json.
"""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
import transformers

from kdlib.benchmarks import figures, rounds, steps
from kdlib.benchmarks.heads import Setting, problem
from kdlib.benchmarks.results import RESULTS, results_of, run_tables
from kdlib.benchmarks.settings import BenchmarkConfig
from kdlib.config import run as configs
from kdlib.config.reading import differences, read_text, read_yaml
from kdlib.errors import ConfigError, RunError
from kdlib.hardware import bf16_instructions
from kdlib.models.loading import load_config, load_tokenizer
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run, part

DTYPES = ("float32", "bfloat16")
PACKAGES = ("kdlib", "torch", "transformers", "accelerate", "trl", "liger-kernel", "torchtune")


def open_study(
    config: str,
    run: str | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    smoke: bool = False,
) -> "Study":
    """The study that the notebook works on.

    Args:
        config: YAML file (kdlib.benchmarks.settings), for a new study.
        run: a study's name, or its folder; made where it does not exist.  A new one where None.
        overrides, smoke: of a new study.  For an existing one, overrides must agree with what it was made
            with.
    """
    os.chdir(runs.project_root())
    root, name = runs.locate(run) if run else (runs.default_root(), None)
    name = name or runs.new_name(root, config, smoke=smoke)
    if not (root / name).exists():
        resolved = configs.load(config, overrides, smoke=smoke, kind=BenchmarkConfig)
        preflight(resolved)
        runs.create(root, name, resolved, config_file=str(config), smoke=smoke)
    study = Study(runs.open_run(root, name))
    asked = configs.parse(study.config.as_dict(), overrides, kind=BenchmarkConfig)
    if lines := differences(study.config.as_dict(), asked.as_dict()):
        raise RunError(
            f"run {name!r} was made with other settings; start a new one for these:\n  " + "\n  ".join(lines)
        )
    print(f"run: {name} ({study.run.status['state']})")
    return study


def preflight(config: BenchmarkConfig) -> None:
    """What can be refused before an hour is spent: a device, a teacher or layers that are not there.

    Raises:
        ConfigError, ModelError: with what to do.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: found cuda, but torch sees no CUDA device; use auto or cpu")
    if config.steps:
        load_tokenizer(config.steps.teacher)
        layers = load_config(config.steps.teacher).get_text_config().num_hidden_layers
        if config.steps.student_layers > layers:
            raise ConfigError(
                f"steps.student_layers is {config.steps.student_layers}, but the teacher has {layers}; "
                f"choose 1 to {layers}"
            )


class Study:
    """One benchmark and what it has found so far."""

    def __init__(self, run: Run) -> None:
        path = run.path / "config.yaml"
        given = read_yaml(read_text(path), str(path))
        given.pop("dashboard", None)  # which studies of before measured too
        self.run, self.config = run, configs.parse(given, name=str(path), kind=BenchmarkConfig)
        self.device = device_named(self.config.device)
        self.results: dict[str, Any] = results_of(run) or {"heads": {}, "steps": {}}
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()

    def machine(self) -> pd.DataFrame:
        """The machine, as it goes into the results."""
        self.results["machine"] = description(self.device)
        self._save()
        return pd.DataFrame(
            {"": [str(value) for value in self.results["machine"].values()]},
            index=list(self.results["machine"]),
        )

    @part
    def check_heads(self) -> None:
        """Every case's value and gradients against float64."""
        for dtype, measurement, inputs in self._heads():
            _, skipped = rounds.prepared(measurement.cases, problem(**{**inputs, "tokens": 1}), self._setting)
            for name, why in skipped.items():
                print(f"{dtype}: {name} is skipped: {why}")
            names = [name for name in measurement.cases if name not in skipped]
            found = rounds.agreements(names, self._setting, **inputs)
            sizes = {"tokens": measurement.tokens, "vocabulary": inputs["vocabulary"]}
            self._add("heads", dtype, **sizes, skipped=skipped, agreement=found)

    @part
    def time_heads(self) -> None:
        """Every case in interleaved rounds."""
        for dtype, measurement, inputs in self._heads():
            prepared, _ = rounds.prepared(measurement.cases, problem(**inputs), self._setting)
            lines = rounds.interleaved(prepared, rounds=measurement.rounds, device=self.device)
            self._add(
                "heads", dtype, rounds=_followed(lines, f"{dtype}, {len(prepared)} cases", measurement.rounds)
            )

    @part
    def measure_memory(self) -> None:
        """Every case's peak, each in a process of its own; ours also with more tokens."""
        for dtype, measurement, inputs in self._heads():
            skipped = self.results["heads"][dtype]["skipped"]
            names = [
                name for name in measurement.cases if name in self.config.heads.memory and name not in skipped
            ]
            print(f"{dtype}: peak memory, a process for each of {len(names)} cases …", flush=True)
            lines = [rounds.memory(name, self._setting, **inputs) for name in names]
            if "ours" in names:
                more = {**inputs, "tokens": self.config.heads.more_tokens * measurement.tokens}
                lines.append(rounds.memory("ours", self._setting, **more))
            self._add("heads", dtype, memory=lines)

    @part
    def time_steps(self) -> None:
        """Whole training steps in interleaved rounds, and the physical floor under them."""
        for precision in self.config.steps.precision if self.config.steps else ():
            options, skipped = {"precision": precision, "seed": self.config.seed}, {}
            lines = steps.rounds(self.config.steps, skipped, device=str(self.device), **options)
            lines = _followed(lines, precision, self.config.steps.rounds)
            made = steps.pair(self.config.steps, device=self.device, **options)
            for name, why in skipped.items():
                print(f"{precision}: {name} is skipped: {why}")
            self._add(
                "steps",
                precision,
                tokens=made.settings.batch * made.settings.length,
                rounds=lines,
                skipped=skipped,
                flops=steps.flops(made),
                flops_per_s=rounds.matmul_speed(made.teacher.dtype, self.device),
            )

    def finish(self) -> None:
        """Write every figure with its table beside it, and mark a study made by hand as done."""
        folder = self.run.path / "figures"
        folder.mkdir(exist_ok=True)
        for name, figure in figures.run_figures(self.results).items():
            figure.savefig(folder / f"{name}.png", dpi=130)
        for name, table in run_tables(self.results).items():
            table.to_csv(folder / f"{name}.csv")
        self.run.finish()

    @property
    def _setting(self) -> Setting:
        return Setting(self.config.heads.chunk, self.config.heads.top_k)

    def _heads(self) -> Iterable[tuple[str, Any, dict[str, Any]]]:
        """(dtype, what is measured in it, the arguments of `problem`)."""
        heads = self.config.heads
        for dtype in DTYPES:
            if heads and (measurement := getattr(heads, dtype)):
                yield (
                    dtype,
                    measurement,
                    {
                        "tokens": measurement.tokens,
                        "hidden": heads.hidden,
                        "vocabulary": heads.vocabulary,
                        "masked": heads.masked,
                        "dtype": dtype,
                        "seed": self.config.seed,
                        "device": str(self.device),
                    },
                )

    def _add(self, part: str, dtype: str, **found: Any) -> None:
        self.results[part][dtype] = {**self.results[part].get(dtype, {}), **found}
        self._save()

    def _save(self) -> None:
        runs.write_json(self.run.path / RESULTS, self.results)


def _followed(lines: Iterable[dict[str, Any]], what: str, rounds: int) -> list[dict[str, Any]]:
    """The lines as a list; says when a round begins, as a study may take an hour."""
    kept: list[dict[str, Any]] = []
    print(f"{what}: warm-up …", flush=True)
    for line in lines:
        if not kept or line["round"] != kept[-1]["round"]:
            print(f"{what}: round {line['round'] + 1} of {rounds}", flush=True)
        kept.append(line)
    return kept


def description(device: torch.device) -> dict[str, object]:
    """What others need to know to compare: processor, threads, versions; no names or paths of the host."""
    instructions = bf16_instructions()
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "logical cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory, GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "bfloat16 instructions": "unknown" if instructions is None else ", ".join(instructions) or "none",
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def device_named(name: str) -> torch.device:
    """`auto` is cuda where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _processor() -> str:
    """`AMD EPYC 7R13`, and where the maker gives family and model only, those."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    known = {"cpu family", "model"} <= facts.keys()
    family = f", family {facts['cpu family']} model {facts['model']}" if known else ""
    return facts.get("model name", platform.processor() or platform.machine()) + family


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None
