"""What the notebooks call: one run, whose stages read and write its folder and nothing else."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import datasets
import pandas as pd
import transformers

from kdlib.config import run as configs
from kdlib.data.batches import Prepared
from kdlib.diagnostics import doctor, forecast, memory, parity
from kdlib.diagnostics.context import as_text
from kdlib.errors import RunError, nearest
from kdlib.evaluation import ablation, caching, code, compare, predictions
from kdlib.hardware import machine, precision_of, world_size
from kdlib.models.loading import device_of
from kdlib.models.sharing import ranks_of
from kdlib.models.teacher import LiveTeacher
from kdlib.plots import comparison as plots
from kdlib.plots.softening import Predictions
from kdlib.routing import use
from kdlib.runs import folder as runs
from kdlib.runs.child_processes import on_ranks
from kdlib.runs.files import StudentFolder
from kdlib.runs.folder import Run, part
from kdlib.runs.log import plan_table, training_table
from kdlib.runs.progress import say_where_edited, say_where_rows_changed
from kdlib.runs.verdict import refuse_unsound
from kdlib.students.student import check_pair, tokenizer_of
from kdlib.tasks import base as tasks
from kdlib.training import run as training
from kdlib.training.plan import objective_of
from kdlib.workbench import measurement, tables, teacher_stage

DRY_STEPS = 5


def open_run(
    config: str,
    run: str | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    smoke: bool = False,
    *,
    new: bool = False,
) -> "Workbench":
    """The run that a notebook works on.

    Args:
        config: YAML file, of a new run, or of which the newest run is taken.
        run: a run's name, or its folder; made from `config` where it does not exist.
        overrides, smoke: of a new run.  For an existing one, overrides must agree with what it was made with.
        new: where `run` is not given, start a new one (the setup notebook).
    """
    os.chdir(runs.project_root())  # paths mean the same in JupyterLab, which starts in notebooks/
    root, name = runs.locate(run) if run else (runs.default_root(), None)
    origin = {"config_file": str(config), "smoke": smoke}
    if name is None and not new:
        made = (each.name for each in runs.all_runs(root) if origin.items() <= each.manifest.items())
        if (name := next(made, None)) is None:
            what = f"{'smoke ' * smoke}run of {config}"
            raise RunError(f"there is no {what} yet; run 00_setup first, or name one in `run`")
    if name is not None and (root / name).exists():
        opened = runs.open_run(root, name)
        resolved = configs.parse(opened.config.as_dict(), overrides)
        runs.open_run(root, name, resolved)
    else:
        resolved = configs.load(config, overrides, smoke=smoke)
        teacher_stage.check_arguments(resolved)
        opened = runs.create(root, name or runs.new_name(root, config, smoke=smoke), resolved, **origin)
    print(f"run: {opened.name} ({opened.status['state']})")
    return Workbench(opened, resolved.launch.processes)


class Workbench:
    """One run with its models and data, loaded when first asked for; `processes` in place of its config's."""

    def __init__(self, run: Run, processes: int | str | None = None) -> None:
        self.run, self.config = run, teacher_stage.resolved(run.config, run.path.parent)
        say_where_edited(run)
        self.task = tasks.task_of(self.config)
        self.wanted_processes = processes or self.config.launch.processes
        pd.options.display.max_colwidth = None  # a formula is read whole
        transformers.utils.logging.disable_progress_bar()  # for each checkpoint is noise
        if runs.headless():  # where a frozen bar is noise
            datasets.disable_progress_bars()

    @property
    def processes(self) -> int:
        """How many share a training that begins here; 1 where this one shares it with others."""
        return 1 if world_size() else ranks_of(self.wanted_processes, self.config.wanted_device)

    @cached_property
    def tokenizer(self):
        return tokenizer_of(self.config)

    @cached_property
    def prepared(self) -> Prepared:
        print("reading the data …", flush=True)
        prepared = tasks.prepare(self.config, self.tokenizer)
        say_where_rows_changed(self.run, prepared.notes["fingerprint"])
        return prepared

    @cached_property
    def teacher(self) -> LiveTeacher | None:
        check_pair(self.config, self.tokenizer)
        if self.config.teacher:
            print(f"loading the teacher, {self.config.teacher.model} …", flush=True)
        return tasks.load_teacher(self.config, self.prepared)

    def student(self):
        """A fresh copy of the untrained student."""
        if "student_layers" not in self.run.manifest:
            raise RunError(f"run {self.run.name} is not set up yet; run 00_setup first")
        return tasks.untrained_student(self.config, self.prepared, self.run.manifest["student_layers"])

    @part
    def setup(self) -> pd.DataFrame:
        """Train the teacher where it must be, choose the student's layers, write the manifest."""
        self.config = teacher_stage.taught(self.run.config, self.run)
        device = device_of(self.config.wanted_device)
        dtype, reason = precision_of(self.config.precision, device)
        layers = tasks.layers_for_student(self.config, self.teacher and self.teacher.model, self.prepared)
        notes, baseline = self.prepared.notes, self.config.baseline
        self.run.add_to_manifest(student_layers=layers)
        student, precision = self.student(), f"{dtype} ({reason})".replace("torch.", "")
        formula = self.formula(student=student)
        self.run.add_to_manifest(formula=formula, seed=self.config.seed, precision=precision, data=notes)
        where = {"versions": tables.versions(), "machine": machine(device)}
        self.run.add_to_manifest(**where, **use.facts_of(self.teacher))
        facts = {
            **tables.of_teacher(self.config, self.prepared, self.teacher, self.run.path.parent),
            "student": tables.size_of(student) + (f": layers {layers} of its model" if layers else ""),
            **self.task.facts(self.prepared, self.tokenizer, self.teacher),
            **tables.texts_in(notes),
            "fingerprint": notes["fingerprint"],
            "precision": precision,
            "objective": formula,
            "baseline": self.formula(baseline.weights, 0.0, student) if baseline else "none",
        }
        return pd.Series(facts).astype(str).to_frame("")

    def formula(self, weights: Mapping | None = None, until: float = 1.0, student: Any = None) -> str:
        """The objective at the start, and where it moves, at the end; with what the student adds."""
        objective = objective_of(self.config, weights, student)
        return "  …  ".join(dict.fromkeys(objective.at(fraction).formula for fraction in (0.0, until)))

    def shapes(self) -> pd.DataFrame:
        """One training batch, and what each model makes of it."""
        models = {"teacher": self.teacher, "student": tasks.asked(self.student(), self.prepared)}
        return tables.of_shapes(models, self.prepared, self.task.unit)

    def example(self) -> Any:
        """The first training row and what is learned of it, as the task shows it."""
        return self.task.example(self.config, self.prepared, self.tokenizer, self.teacher)

    @property
    def trial(self) -> StudentFolder:
        """Where the dry run leaves its figures."""
        return StudentFolder(self.run.path / "dry_run")

    @part
    def doctor(self) -> None:
        """Say what is wrong with this config, data and models before they train; kd doctor --fix mends.

        What is critical keeps `train` from beginning, and stands in the report.
        """
        briefly = self.run.config.teacher_stage is not None and self.run.manifest.get("smoke", False)
        found = doctor.diagnose(self.config, made={**self._made(), "is_taught_briefly": briefly})
        self.run.add_to_manifest(doctor=[asdict(each) for each in found])
        print("the doctor:", as_text(found))

    def selftest(self) -> pd.DataFrame:
        """What must be equal on this config, these models and this text, compared: a line each."""
        return parity.parity(self.config, **self._made())

    def _made(self, *, trains: bool = False) -> dict[str, Any]:
        """What a training takes, the teacher as it `trains`: where it is asked once, what it said."""
        load, place = lambda: self.teacher, (self.config, self.prepared, self.run.path.parent)
        asked = partial(caching.in_training, *place, load) if trains else load
        pair = tasks.student_and_teacher(self.config, self.student(), self.prepared, asked)
        return {**pair, "tokenizer": self.tokenizer, "prepared": self.prepared}

    @part
    def dry_run(self) -> pd.DataFrame:
        """Five optimizer steps of the real schedule and one evaluation; returns the terms, step by step."""
        shutil.rmtree(self.trial.path, ignore_errors=True)
        if self.processes == 1:
            self.first_steps()
        else:
            on_ranks(self.run, self.processes, "--dry-run")
        return tables.of_steps(training_table(self.trial))

    def first_steps(self) -> None:
        """The dry run in this process, or this process's part of it."""
        trial = self._train(self.trial, label="dry run", stop_after=DRY_STEPS)
        metrics = trial.evaluate()
        took = measurement.by_steps(self.config, trial, metrics["eval_runtime"])
        if not trial.is_world_process_zero():
            return
        self.run.add_to_manifest(
            optimizer_steps=took.steps,
            warmup_steps=trial.args.get_warmup_steps(took.steps),
            seconds_per_step=round(took.step_s, 3),
        )
        print(f"held-out: loss {metrics['eval_loss']:.3f}, evaluated in {took.evaluation_s:.0f} s")
        most = training_table(self.trial)["memory_gib"].max()
        print(f"forecast for the student, from these steps: {took}; memory in use {most:.1f} GiB")

    def forecast(self) -> None:
        """Say what the whole run will hold in memory, moment by moment."""
        sizes = {"rows": len(self.prepared.train), "vocabulary": self.prepared.vocabulary}
        found = forecast.advised(self.config, memory.forecast, devices=self.processes, **sizes)
        print(forecast.as_text(found))

    def plan(self) -> pd.DataFrame:
        """The schedules at every tenth of the training that the dry run began."""
        return tables.of_plan(plan_table(self.trial))

    @part
    def train(self, *, anyway: bool = False) -> None:
        """The distilled student, from its last checkpoint where there is one.

        Args:
            anyway: in spite of the doctor's critical findings, which then head the report.

        Raises:
            RunError: there are such findings, and nobody said `anyway`.
        """
        if anyway:
            self.run.add_to_manifest(anyway=True)
        refuse_unsound(self.run.manifest)
        self._train(self.run, label="kd")

    @part
    def train_baseline(self) -> None:
        """The same student, data, order, steps and learning rate, with the baseline's weights."""
        if self.config.baseline:
            refuse_unsound(self.run.manifest)
            self._train(self.run.baseline, label="baseline", weights=self.config.baseline.weights)

    @part
    def compare(self) -> dict[str, Any]:
        """All models on the held-out rows, and on what `code` asks; writes files and the picture of it."""
        results = compare.compare_run(self.run, self.config, self.tokenizer, self.prepared)
        results |= {"code": code.score_run(self.run, self.config)} if self.config.code else {}
        plots.comparison_bars(results).savefig(self.run.path / f"{plots.BARS}.png", dpi=130)
        return results

    def explore(self, *students: str) -> Predictions | None:
        """What the teacher and these students ("distilled", "baseline", "untrained") say of held-out rows.

        A summary goes into explorers.json.  A baseline that is not there is left out; without a teacher all.
        """
        folders = {"distilled": self.run, "baseline": self.run.baseline}
        for name in set(students).difference(folders, ["untrained"]):
            hint = f"{nearest(name, [*folders, 'untrained'])}; there are {', '.join(folders)}, untrained"
            raise RunError(f"there is no student {name!r}{hint}")
        if self.teacher is None:
            print("teacher: null, so there is nothing to explore")
            return None
        dtype, _ = precision_of(self.config.precision, device_of(self.config.wanted_device))

        def asked(name: str) -> LiveTeacher:
            print(f"asking the {name} model …", flush=True)
            if name == "teacher":
                return self.teacher
            if name == "untrained":
                return tasks.asked(self.student().to(dtype), self.prepared)
            stored = compare.student_in(folders[name], self.prepared)
            return tasks.asked(self.task.load(stored, self.prepared, dtype), self.prepared)

        names = ["teacher", *(name for name in students if name != "baseline" or self.config.baseline)]
        models = {name: partial(asked, name) for name in names}
        found = predictions.look(models, self.task.sample(self.prepared, self.tokenizer), self.task.unit)
        predictions.write(self.run, found)
        return found

    def experts(self) -> dict[str, Any]:
        """Which speak on held-out rows, by the teacher's own routing and as it taught: experts.json."""
        return use.of_run(self.run, self.config, self.teacher, self.prepared, self.tokenizer)

    def ablation(self) -> tuple[pd.DataFrame, str]:
        """This run beside those that ask its teacher otherwise, at equal student tokens; and what it says."""
        return ablation.of_run(self.run, self.teacher, self.student)

    def _train(self, folder: StudentFolder, *, label: str, weights: Any = None, **options):
        if folder.is_trained:
            print(f"{label}: trained already")
            return None
        if self.processes > 1 and not options:
            return on_ranks(self.run, self.processes)  # both students
        made = self._made(trains=True)
        print(f"{label}: {self.formula(weights, 0.0, made['student'])}")
        return training.train(self.config, folder, **made, label=label, weights=weights, **options)
