"""Where a training's figures go: metrics.jsonl, and wandb, tensorboard and trackio, under the same names.

Each student is a run of the tracker's own, `<run>/kd` or `<run>/baseline`, grouped by run.  A metric that
`trackers.alias` gives another name is sent under both.  A tracker that fails is left behind, aloud.  One more
is a class here and a line in TRACKERS.
"""

import io
import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    rewrite_logs,
)

from kdlib.errors import ConfigError, nearest
from kdlib.runs.files import StudentFolder, now, write_text
from kdlib.runs.log import append_metrics

PATIENCE = 300  # seconds that a finished training waits for wandb to send its last figures
OFFLINE = ("offline", "dryrun", "disabled")


def figures_of(logs: Mapping[str, float], state: TrainerState) -> dict[str, float]:
    """A log by the names of files and trackers, train/… and eval/…; nothing where it has no loss."""
    if "loss" not in logs and "eval_loss" not in logs:
        return {}
    figures = rewrite_logs({name: value for name, value in logs.items() if name != "epoch"})
    return {"train/step": state.global_step, "train/epoch": logs["epoch"], **figures}


def aliased(figures: Mapping[str, float], alias: Mapping[str, str]) -> dict[str, str]:
    """{another name: ours} of those that belong to this log: eval/… to an evaluation's, train/… to others."""
    side = "eval/" if any(name.startswith("eval/") for name in figures) else "train/"
    return {theirs: ours for theirs, ours in alias.items() if theirs.startswith(side)}


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl."""

    def __init__(self, folder: StudentFolder) -> None:
        self.folder = folder

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and (figures := figures_of(logs, state)):
            append_metrics(self.folder, {**figures, "time": now()})


@dataclass(frozen=True)
class TrackedTraining:
    """What a tracker is told of a training."""

    folder: StudentFolder
    run: Path  # the run's folder, where trackers leave their files; a baseline's lies in it
    label: str
    facts: Mapping[str, Any]  # its config and formula

    @property
    def name(self) -> str:
        run = self.facts["training"].get("run_name") or self.run.name
        return f"{run}/{self.label or self.folder.path.name}"

    @property
    def project(self) -> str:
        return self.facts["training"].get("project") or os.environ.get("WANDB_PROJECT") or "kdlib"


class Tracker:
    """One training's run in one tracker; made of the training and the step that it goes on from, 0 if new."""

    where: str  # it can be looked at, in words
    run: Any  # the tracker's own

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def finish(self, failed: bool) -> None:
        self.run.finish()


class WandbRun(Tracker):
    """WANDB_MODE, WANDB_PROJECT, WANDB_DIR … mean what they always do; unreachable, it records offline."""

    def __init__(self, training: TrackedTraining, step: int) -> None:
        import wandb

        known = training.folder.path / "wandb_id.txt"
        if not (step and known.exists()):
            write_text(known, uuid.uuid4().hex[:8])
        patience = wandb.setup().settings.finish_timeout or PATIENCE
        begin = partial(
            wandb.init,
            project=training.project,
            entity=training.facts["trackers"]["entity"],
            name=training.name,
            group=training.run.name,
            job_type=training.label or None,
            id=known.read_text(),
            resume="allow",
            config=dict(training.facts),
            reinit="create_new",
            dir=os.environ.get("WANDB_DIR") or str(training.run),
            settings=wandb.Settings(  # neither draws into a notebook nor captures what is printed there
                silent=True, console="off", finish_timeout=patience, finish_timeout_raises=True
            ),
        )
        try:
            self.run = begin()
        except wandb.errors.CommError as error:
            print(f"wandb: cannot be reached ({str(error).splitlines()[0]}); recording offline", flush=True)
            wandb.teardown()  # it would hold the id for in use
            self.run = begin(mode="offline")
        local = f"send it with: wandb sync {os.path.relpath(Path(self.run.dir).parent)}"
        self.where = local if self.run.offline else str(self.run.url)

    def finish(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class TensorboardRun(Tracker):
    """Event files below runs/<run>/tensorboard; those after a checkpoint that is gone on from are purged."""

    def __init__(self, training: TrackedTraining, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = training.run / "tensorboard" / (training.label or training.folder.path.name)
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        if not step:
            facts = json.dumps(training.facts, indent=2, ensure_ascii=False)
            self.writer.add_text("facts", f"```\n{facts}\n```")
        self.where = f"look at it with: tensorboard --logdir {os.path.relpath(folder.parent)}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self, failed: bool) -> None:
        self.writer.close()


class TrackioRun(Tracker):
    """In trackio's own folder, or where TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

    def __init__(self, training: TrackedTraining, step: int) -> None:
        import trackio

        settings = training.facts["training"]
        spaces = {name: settings.get(f"trackio_{name}") for name in ("space_id", "bucket_id")}
        known = {"name": training.name, "group": training.run.name, "config": dict(training.facts), **spaces}
        with redirect_stdout(io.StringIO()):  # it says where its folder is: a path of this machine
            resume = "allow" if step else "never"
            self.run = trackio.init(training.project, resume=resume, embed=False, **known)
        self.where = f"look at it with: trackio show --project {training.project}"

    def finish(self, failed: bool) -> None:
        with redirect_stdout(io.StringIO()):
            super().finish(failed)


TRACKERS: dict[str, Callable[[TrackedTraining, int], Tracker]] = {
    "wandb": WandbRun,
    "tensorboard": TensorboardRun,
    "trackio": TrackioRun,
}


def named_in(args: TrainingArguments) -> list[str]:
    """Those of TRACKERS in `report_to`; transformers' own callbacks serve the others."""
    return [name for name in args.report_to or () if name in TRACKERS]


def check_installed(names: Iterable[str]) -> None:
    """Raises a ConfigError for a tracker that is not here, transformers' own among them, or that is none."""
    here = {*get_available_reporting_integrations(), *filter(find_spec, TRACKERS)}
    for name in names:
        if name not in (known := (*TRACKERS, *INTEGRATION_TO_CALLBACK)):
            what = f"found {name!r}{nearest(str(name), known)}; it is none, {', '.join(dict.fromkeys(known))}"
            raise ConfigError(f"training.report_to: {what}")
        if name not in here:
            package = name.replace("_", "-")
            raise ConfigError(f"training.report_to: {name} is not installed; run: pip install {package}")


def check_key(names: Iterable[str]) -> None:
    """Raises a ConfigError where wandb would ask for a key."""
    if "wandb" not in names:
        return
    import wandb
    from requests.utils import get_netrc_auth

    mine = wandb.setup().settings
    known = mine.api_key or mine.identity_token_file or get_netrc_auth(mine.base_url)
    if mine.mode not in OFFLINE and not known:
        wandb.teardown()  # else it would not see a WANDB_MODE or a key that is set now, in the same kernel
        raise ConfigError(
            "training.report_to: wandb is online and has no API key; run `wandb login` or set WANDB_API_KEY, "
            "or record offline with WANDB_MODE=offline"
        )


class Tracking(TrainerCallback):
    """Tells the trackers of these names what metrics.jsonl is told; on leaving, their runs end."""

    def __init__(self, names: Iterable[str], training: TrackedTraining) -> None:
        self.names, self.training, self.open = tuple(names), training, dict[str, Tracker]()
        self.missed: set[str] = set()  # other names of what was not in a log, each said once

    def __enter__(self):
        return self

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for name in self.names:
                self._guarded(name, self._begin, name, state.global_step)

    def _begin(self, name: str, step: int) -> None:
        self.open[name] = TRACKERS[name](self.training, step)
        print(f"{name}: {self.training.name}; {self.open[name].where}", flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.open and (figures := figures_of(logs, state)):
            figures = self._with_aliases(figures)
            for name, tracker in [*self.open.items()]:
                self._guarded(name, tracker.log, figures, state.global_step)

    def _with_aliases(self, figures: Mapping[str, float]) -> dict[str, float]:
        alias = aliased(figures, self.training.facts["trackers"]["alias"])
        found = {theirs: figures[ours] for theirs, ours in alias.items() if ours in figures}
        for theirs in [name for name in alias if name not in found and name not in self.missed]:
            self.missed.add(theirs)
            known = ", ".join(sorted(figures))
            print(f"trackers.alias: {theirs}: this log has no {alias[theirs]}; it has {known}", flush=True)
        return {**figures, **found}

    def __exit__(self, kind, *error) -> None:
        for name, tracker in [*self.open.items()]:
            self._guarded(name, tracker.finish, kind is not None)
        self.open.clear()

    def _guarded(self, name: str, act: Callable[..., None], *given: Any) -> None:
        try:
            act(*given)
        except Exception as error:  # anything another's software may raise: none is worth a training
            self.open.pop(name, None)
            why = f"{type(error).__name__}: {error}"
            print(f"{name}: {why}; going on without it, metrics.jsonl has every figure", flush=True)
