"""Where the log of a run goes besides its JSON lines: TensorBoard always, W&B and MLflow when asked for.

A resumed run goes on in the tracker run that it began: TensorBoard forgets the steps that are done again, the
others are found by the identifiers in `trackers.json`. Only the first process has trackers.
"""

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from training.checkpoint import write_synced
from training.config import TrackerName
from training.errors import ConfigError

IDENTIFIERS_FILE = "trackers.json"
PROJECT = "dinoserve"


class Tracker(Protocol):
    """Takes numbers over steps."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Takes in the numbers of a step; names are `kind/name`, such as `step/loss_nats`."""
        ...

    def go_back(self, step: int) -> None:
        """Forgets what came after a step, which is done again; nothing where a tracker can't."""
        ...

    def close(self) -> None:
        """Sends what is left."""
        ...


@contextlib.contextmanager
def open_trackers(
    asked: Sequence[TrackerName],
    run_dir: Path,
    settings: Mapping[str, Any],
    *,
    from_step: int,
    say: Callable[[str], None],
) -> Iterator[list[Tracker]]:
    """Opens TensorBoard, and the trackers that were asked for.

    Args:
        asked: W&B and MLflow need to be installed and set up by their own means (`wandb login`,
            MLFLOW_TRACKING_URI).
        run_dir: Of the run; its name becomes the tracker's.
        settings: Recorded by W&B and MLflow.
        from_step: The step that the run goes on from; later ones will be written again.
        say: Told when there is no TensorBoard.

    Raises:
        ConfigError: A tracker was asked for and is not installed.
    """
    for name in asked:  # before anything is opened
        _package(name)
    trackers: list[Tracker] = []
    with contextlib.ExitStack() as stack:
        try:
            trackers.append(_TensorBoard(run_dir / "tensorboard", from_step=from_step))
        except ImportError:
            say("there will be no TensorBoard files: pip install tensorboard to get them")
        if asked:
            known = _identifiers(run_dir)
            for name in asked:
                opened = _OPENERS[name](_package(name), run_dir, known.get(name), settings)
                trackers.append(opened)
                known[name] = opened.identifier
            write_synced(run_dir / IDENTIFIERS_FILE, json.dumps(known).encode())
        for tracker in trackers:
            stack.callback(tracker.close)
        yield trackers


def numbers_in(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a log line under the names that trackers show them by; words and gaps are left out."""
    return {
        f"{kind}/{name}": float(value) for name, value in values.items() if isinstance(value, int | float)
    }


class _TensorBoard:
    def __init__(self, folder: Path, *, from_step: int) -> None:
        self._folder = folder
        self._writer: Any = self._opened(from_step)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()  # a killed process has lost nothing that its checkpoint has

    def go_back(self, step: int) -> None:
        self._writer.close()
        self._writer = self._opened(step)

    def close(self) -> None:
        self._writer.close()

    def _opened(self, from_step: int) -> Any:  # noqa: ANN401  a class that ships no types
        from torch.utils.tensorboard.writer import SummaryWriter  # noqa: PLC0415  it may be missing

        # Whatever was written from there on before is not shown any more.
        return SummaryWriter(str(self._folder), purge_step=from_step + 1)


class _WandB:
    def __init__(
        self,
        wandb: Any,  # noqa: ANN401  a module that ships no types
        run_dir: Path,
        identifier: str | None,
        settings: Mapping[str, Any],
    ) -> None:
        self._run = wandb.init(
            project=PROJECT,
            name=run_dir.name,
            dir=str(run_dir),
            id=identifier,
            resume="allow",
            config=dict(settings),
        )
        self.identifier = str(self._run.id)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def go_back(self, step: int) -> None:
        """W&B passes over steps below its last one, so the curves go on where the run was."""

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(
        self,
        mlflow: Any,  # noqa: ANN401  a module that ships no types
        run_dir: Path,
        identifier: str | None,
        settings: Mapping[str, Any],
    ) -> None:
        self._client = mlflow.MlflowClient()
        if identifier is None:
            experiment = self._client.get_experiment_by_name(PROJECT)
            where = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
            identifier = str(self._client.create_run(where, run_name=run_dir.name).info.run_id)
            for name, value in _flat(settings).items():
                self._client.log_param(identifier, name, value)
        self.identifier = identifier

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._client.log_metric(self.identifier, name, number, step=step)

    def go_back(self, step: int) -> None:
        """MLflow keeps both values of a step."""

    def close(self) -> None:
        self._client.set_terminated(self.identifier)


_OPENERS: dict[str, Callable[[Any, Path, str | None, Mapping[str, Any]], "_WandB | _MLflow"]] = {
    "wandb": _WandB,
    "mlflow": _MLflow,
}


def _package(name: str) -> Any:  # noqa: ANN401  a module that ships no types
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"the tracker {name} was asked for and is not installed: pip install {name}, or leave it out of "
            "--trackers"
        ) from error


def _identifiers(run_dir: Path) -> dict[str, str]:
    path = run_dir / IDENTIFIERS_FILE
    try:
        found: dict[str, str] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: remove it, and trackers begin new runs") from error
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = str(value)[:250]
    return found
