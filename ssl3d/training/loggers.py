"""Loggers of a training: TensorBoard, Weights & Biases, MLflow; none of them can end or change it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from ssl3d.files import write_whole
from ssl3d.json_files import parse_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IDENTITIES = "loggers.json"
"""File of a run with what identifies it at W&B and MLflow, so that a resumed run goes on there."""
PATIENCE = 60.0
"""Longest wait in seconds for W&B to upload the rest when the training has ended."""
_QUIET = {
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
"""Environment of the tools where the user sets none: no reports of use, no long wait for a dead server."""
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"://[^/@\s]+@")


@dataclass(frozen=True)
class LoggedRun:
    """What loggers know of a training when they start.

    Attributes:
        folder: Folder for local files of the loggers.
        title: Name of the run.
        group: Name that runs have in common which belong together; empty for none.
        config: Options of the training as plain values.
        begin: Number of steps that are done already.
        identity: What identified the run when it started before; empty for a new one.
    """

    folder: Path
    title: str
    group: str
    config: Mapping[str, Any]
    begin: int
    identity: str = ""


class Logger(ABC):
    """One place where a run is logged; its methods may raise anything.

    Attributes:
        package: Module that it needs.
        extra: Extra of ssl3d that installs the module; empty where it is always there.
        identity: What identifies the run there when it goes on; empty where nothing is needed.
    """

    package: ClassVar[str]
    extra: ClassVar[str] = ""
    identity: str = ""

    @abstractmethod
    def __init__(self, run: LoggedRun) -> None: ...

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log finite numbers after a step."""

    @abstractmethod
    def picture(self, name: str, figure: Figure, path: Path, step: int) -> None:
        """Log a figure, which has been saved as a PNG file too."""

    def artefact(self, name: str, folder: Path) -> None:  # noqa: B027 - most have no place for files
        """Log the files of a folder, such as an encoder and its card."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """Hand over what is left, and say whether the training has come to its end."""


class TensorBoard(Logger):
    """Event files in the run's folder `tensorboard`."""

    package = "tensorboard"

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = run.begin + 1 if run.begin else None
        self._events = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def picture(self, name: str, figure: Figure, path: Path, step: int) -> None:
        """Add the figure itself to the event files."""
        self._events.add_figure(f"{name}/picture", figure, step)

    def close(self, finished: bool) -> None:
        """Flush and close the event files."""
        self._events.close()


class WandB(Logger):
    """Run of Weights & Biases, kept offline where no account is known.

    Its environment variables hold: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR and all others.
    """

    package = "wandb"
    extra = "wandb"

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        settings: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "disable_git": True,
            "disable_code": True,
        }
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            settings["init_timeout"] = 30.0
        # Asking for a key would keep a job waiting whose terminal nobody sees.
        offline = "WANDB_MODE" not in os.environ and not _knows_account()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ssl3d"),
            name=run.title,
            group=run.group or None,
            id=run.identity or None,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            config=dict(run.config),
            mode="offline" if offline else None,
            settings=wandb.Settings(**settings),
        )
        self.identity = str(self._run.id)
        # A step may come again after a kill; with an axis of its own it is no error, but the same point.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve, along the axis `step`."""
        self._run.log({**values, "step": step})

    def picture(self, name: str, figure: Figure, path: Path, step: int) -> None:
        """Add the PNG file as an image."""
        import wandb

        self._run.log({f"{name}/picture": wandb.Image(str(path)), "step": step})

    def artefact(self, name: str, folder: Path) -> None:
        """Log a folder as an artifact of type model."""
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", f"{name}-{self.identity}"), type="model")
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            # Not copied first: what a run has exported does not change.
            artifact.add_file(str(path), path.relative_to(folder).as_posix(), policy="immutable")
        self._run.log_artifact(artifact)

    def close(self, finished: bool) -> None:
        """Wait until everything is written or uploaded, but not for ever."""
        failures: list[BaseException] = []

        def finish() -> None:
            try:
                self._run.finish(exit_code=0 if finished else 1)
            except BaseException as error:
                failures.append(error)

        waiting = threading.Thread(target=finish, daemon=True)
        waiting.start()
        waiting.join(PATIENCE)
        if waiting.is_alive():
            raise TimeoutError(
                f"not all is uploaded after {PATIENCE:.0f} s; wandb sync {self._run.dir} does the rest"
            )
        if failures:
            raise failures[0]


class MLflow(Logger):
    """Run of MLflow, at the address of MLFLOW_TRACKING_URI, else in the tool's own local store.

    MLFLOW_EXPERIMENT_NAME (else `ssl3d`), MLFLOW_TRACKING_TOKEN and its other variables hold too.
    """

    package = "mlflow"
    extra = "mlflow"

    def __init__(self, run: LoggedRun) -> None:
        import logging

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

        self._client = MlflowClient()
        if run.identity:
            self._client.update_run(run.identity, status="RUNNING")
            self.identity = run.identity
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ssl3d")
        experiment = self._client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self._client.create_experiment(name)
        tags = {MLFLOW_RUN_NAME: run.title} | ({"group": run.group} if run.group else {})
        self.identity = str(self._client.create_run(place, tags=tags).info.run_id)
        self._params(run.config)

    def _params(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(_plain_name(key), str(value)[:500]) for key, value in _flat(config)]
        for first in range(0, len(params), 100):  # the most that MLflow takes at once
            self._client.log_batch(self.identity, params=params[first : first + 100])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""
        import time

        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_plain_name(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self.identity, metrics=metrics)

    def picture(self, name: str, figure: Figure, path: Path, step: int) -> None:
        """Add the PNG file to the artifacts of the run."""
        self._client.log_artifact(self.identity, str(path), "pictures")

    def artefact(self, name: str, folder: Path) -> None:
        """Add a folder to the artifacts of the run."""
        self._client.log_artifacts(self.identity, str(folder), name)

    def close(self, finished: bool) -> None:
        """Say that the run has finished, or was stopped."""
        self._client.set_terminated(self.identity, "FINISHED" if finished else "KILLED")


KINDS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


class Loggers:
    """Loggers of one training; one that fails says so once, and is left out from then on.

    They are made on one rank alone, and called between steps, never within one.

    Args:
        names: Names of the loggers.
        folder: Folder for their local files and for what identifies the run.
        title: Name of the run.
        config: Options of the training as plain values.
        warn: Function that prints a line.
        begin: Number of steps that are done already.
        group: Name that runs have in common which belong together.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        title: str,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
        begin: int = 0,
        group: str = "",
    ) -> None:
        self._warn = warn
        self._open: dict[str, Logger] = {}
        for key, value in _QUIET.items():
            if key.lower().startswith(tuple(names)):
                os.environ.setdefault(key, value)
        known = _identities(folder)
        for name in names:
            if not _installed(name):
                continue  # `missing_loggers` says so before the training
            with self._sheltered(name):
                run = LoggedRun(folder, title, group, _plain(config), begin, known.get(name, ""))
                self._open[name] = KINDS[name](run)
        identities = {name: logger.identity for name, logger in self._open.items() if logger.identity}
        if identities and identities != known:
            try:
                write_whole(folder / IDENTITIES, json.dumps(identities, indent=1) + "\n")
            except OSError as error:
                warn(f"warning: {folder / IDENTITIES}: {error.strerror}; a resumed run will be a new one")

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Log those of the values that are finite numbers."""
        numbers = {
            name if "/" in name else f"run/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self._each(lambda logger: logger.scalars(numbers, step))

    def picture(self, name: str, figure: Figure, path: Path, step: int) -> None:
        """Log a figure, which has been saved as a PNG file too."""
        self._each(lambda logger: logger.picture(name, figure, path, step))

    def artefact(self, name: str, folder: Path) -> None:
        """Log the files of a folder, such as an encoder and its card."""
        self._each(lambda logger: logger.artefact(name, folder))

    def __enter__(self) -> Loggers:
        """Return the loggers, which are closed when the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every logger; the training has finished where nothing was raised."""
        self.close(finished=kind is None)

    def close(self, finished: bool) -> None:
        """Close every logger; `finished` tells whether the training has come to its end."""
        self._each(lambda logger: logger.close(finished))
        self._open = {}

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self._open.items()):
            with self._sheltered(name):
                call(logger)

    @contextlib.contextmanager
    def _sheltered(self, name: str) -> Iterator[None]:
        """Leave a logger out from its first failure on, whatever that is."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            reason = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
            self._warn(f"warning: logger {name} is left out from here on ({reason}); the training goes on")


def check_loggers(names: Sequence[str]) -> None:
    """Check the names of loggers that options hold.

    Raises:
        ValueError: A name is unknown, or stands there twice.
    """
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise ValueError(f"logger is {unknown[0]!r}, must be of {', '.join(KINDS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"logger names one twice: {' '.join(names)}; name each once")


def missing_loggers(names: Sequence[str]) -> list[str]:
    """Return a line for each logger whose package is not installed.

    Example:
        >>> missing_loggers(["tensorboard"])
        []
    """
    lacking = [name for name in names if not _installed(name)]
    return [
        f"warning: --logger {name} is left out, as its package is not installed; "
        f"pip install 'ssl3d[{KINDS[name].extra}]' brings it"
        for name in lacking
    ]


def without_secrets(text: str) -> str:
    """Remove the values of secret environment variables, and passwords in addresses, from a text.

    Example:
        >>> without_secrets("no answer from https://ann:pass@mlflow.example/api")
        'no answer from https://***@mlflow.example/api'
    """
    for key, value in os.environ.items():
        if _SECRET.search(key) and len(value) >= 6:
            text = text.replace(value, "***")
    return _IN_ADDRESS.sub("://***@", text)


def _installed(name: str) -> bool:
    spec = find_spec(KINDS[name].package)
    # A folder `wandb` in the working directory, which W&B makes, has a spec without an origin.
    return spec is not None and spec.origin is not None


def _plain(value: Any) -> Any:
    """Return a configuration without secrets: an address of data may have a password in it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return without_secrets(value) if isinstance(value, str) else value


def _knows_account() -> bool:
    """Tell whether W&B has a key or a token, from the environment or from `wandb login`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import netrc
    from urllib.parse import urlsplit

    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    place = Path(os.environ.get("NETRC", Path.home() / ".netrc")).expanduser()
    try:
        return netrc.netrc(str(place)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _identities(folder: Path) -> dict[str, str]:
    try:
        content = parse_json((folder / IDENTITIES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in content.items()} if isinstance(content, dict) else {}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain_name(name: str) -> str:
    return re.sub(r"[^\w/. -]", "_", name)
