"""What a training tells wandb, tensorboard and trackio: the lines of metrics.jsonl, figure for figure, under
the same names.

Each student is a run of the tracker's own, `<run>/kd` or `<run>/baseline`, in a group named like the run.  It
ends when its training does, and goes on when that is resumed.  A tracker that fails is left behind, aloud: no
training is lost for its sake.
"""

import contextlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from kdlib.errors import ConfigError
from kdlib.runs.files import StudentFolder, write_text
from kdlib.runs.folder import Run
from kdlib.training.callbacks import figures_of

PATIENCE = 300  # seconds that a finished training waits for wandb to send its last figures
OFFLINE = ("offline", "dryrun", "disabled")


@dataclass(frozen=True)
class Subject:
    """The training that a tracker is told of; `facts` are its config and formula."""

    folder: StudentFolder
    label: str
    facts: Mapping[str, Any]

    @property
    def run(self) -> Path:
        """The run's folder, which the baseline's lies in: trackers leave their files there."""
        return self.folder.path if isinstance(self.folder, Run) else self.folder.path.parent

    @property
    def name(self) -> str:
        return f"{self.run.name}/{self.label or self.folder.path.name}"

    @property
    def project(self) -> str:
        return self.facts.get("training", {}).get("project") or os.environ.get("WANDB_PROJECT") or "kdlib"


class Tracker(Protocol):
    """One training's run in one tracker; made with the optimizer step that it goes on from, 0 for a new
    one.
    """

    where: str  # it can be looked at, in words

    def __init__(self, subject: Subject, step: int) -> None: ...

    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def finish(self, failed: bool) -> None: ...


class WandbRun:
    """WANDB_MODE, WANDB_PROJECT, WANDB_DIR and the rest mean what they always do; where it cannot be
    reached it records offline.
    """

    def __init__(self, subject: Subject, step: int) -> None:
        import wandb

        known = subject.folder.path / "wandb_id.txt"
        if not (step and known.exists()):
            write_text(known, uuid.uuid4().hex[:8])
        mine = wandb.setup().settings
        settings = wandb.Settings(  # neither draws into a notebook nor captures what is printed there
            silent=True,
            console="off",
            finish_timeout=mine.finish_timeout or PATIENCE,
            finish_timeout_raises=True,
        )
        options = {
            "project": subject.project,
            "name": subject.name,
            "group": subject.run.name,
            "job_type": subject.label or None,
            "id": known.read_text(),
            "resume": "allow",
            "config": dict(subject.facts),
            "reinit": "create_new",
            "dir": os.environ.get("WANDB_DIR") or str(subject.run),
            "settings": settings,
        }
        try:
            self.run = wandb.init(**options)
        except wandb.errors.CommError as error:
            print(f"wandb: cannot be reached ({str(error).splitlines()[0]}); recording offline", flush=True)
            wandb.teardown()  # it would hold the id for in use
            self.run = wandb.init(**options, mode="offline")
        self.where = (
            f"send it with: wandb sync {os.path.relpath(Path(self.run.dir).parent)}"
            if self.run.offline
            else str(self.run.url)
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def finish(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class TensorboardRun:
    """Event files below runs/<run>/tensorboard; what was logged after the checkpoint that a training goes
    on from is purged.
    """

    def __init__(self, subject: Subject, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = subject.run / "tensorboard" / (subject.label or subject.folder.path.name)
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        if not step:
            self.writer.add_text(
                "facts", f"```\n{json.dumps(subject.facts, indent=2, ensure_ascii=False)}\n```"
            )
        self.where = f"look at it with: tensorboard --logdir {os.path.relpath(folder.parent)}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self, failed: bool) -> None:
        self.writer.close()


class TrackioRun:
    """In trackio's own folder (TRACKIO_DIR), or wherever TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

    def __init__(self, subject: Subject, step: int) -> None:
        import trackio

        training = subject.facts.get("training", {})
        spaces = {name: training.get(f"trackio_{name}") for name in ("space_id", "bucket_id")}
        with contextlib.redirect_stdout(io.StringIO()):  # it says where its folder is: a path of this machine
            self.run = trackio.init(
                subject.project,
                name=subject.name,
                group=subject.run.name,
                config=dict(subject.facts),
                resume="allow" if step else "never",
                embed=False,
                **spaces,
            )
        self.where = f"look at it with: trackio show --project {subject.project}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def finish(self, failed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbRun, "tensorboard": TensorboardRun, "trackio": TrackioRun}


def check_installed(names: Iterable[str]) -> None:
    """Raises a ConfigError for a tracker that is not here."""
    for name in names:
        if name in TRACKERS and find_spec(name) is None:
            raise ConfigError(f"training.report_to: {name} is not installed; run: pip install {name}")


def check_key(names: Iterable[str]) -> None:
    """Raises a ConfigError where wandb would ask for a key: nobody may be there to answer."""
    if "wandb" not in names:
        return
    import wandb
    from requests.utils import get_netrc_auth

    mine = wandb.setup().settings
    if mine.mode not in OFFLINE and not (
        mine.api_key or mine.identity_token_file or get_netrc_auth(mine.base_url)
    ):
        wandb.teardown()  # else it would not see a WANDB_MODE or a key that is set now, in the same kernel
        raise ConfigError(
            "training.report_to: wandb is online and has no API key; run `wandb login` or set WANDB_API_KEY, "
            "or record offline with WANDB_MODE=offline"
        )


class Tracking(TrainerCallback):
    """Tells the trackers of these names what metrics.jsonl is told; on leaving, their runs end with the
    training.
    """

    def __init__(self, names: Iterable[str], subject: Subject) -> None:
        self.names, self.subject = tuple(names), subject
        self.open: dict[str, Tracker] = {}

    def __enter__(self):
        return self

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for name in self.names:
                self._guarded(name, self._begin, name, state.global_step)

    def _begin(self, name: str, step: int) -> None:
        self.open[name] = TRACKERS[name](self.subject, step)
        print(f"{name}: {self.subject.name}; {self.open[name].where}", flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if figures := figures_of(logs, state):
            for name, tracker in [*self.open.items()]:
                self._guarded(name, tracker.log, figures, state.global_step)

    def __exit__(self, kind, *error) -> None:
        for name, tracker in [*self.open.items()]:
            self._guarded(name, tracker.finish, kind is not None)
        self.open.clear()

    def _guarded(self, name: str, act: Callable[..., None], *given: Any) -> None:
        try:
            act(*given)
        except Exception as error:
            # of another's software, anything from a lost network to a full disk: none is worth a training
            self.open.pop(name, None)
            print(
                f"{name}: {type(error).__name__}: {error}; going on without it, metrics.jsonl has every "
                "figure",
                flush=True,
            )
