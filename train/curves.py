"""Curves of a training run in TensorBoard, MLflow or Weights & Biases, written while the run goes on: `--log TOOL`.

    logs/tensorboard/STUDENT-KEY-PACKS    one folder for each run; `tensorboard --logdir logs/tensorboard`
    logs/mlflow                           or the server that MLFLOW_TRACKING_URI names
    logs/wandb                            WANDB_MODE=offline writes here alone, for `wandb sync`

The folders lie below the main working tree. A resumed run continues the record of the interrupted one: its id lies
beside the checkpoint. The default, DVCLive, is in train/progress.py.
"""

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from extract.base.errors import RetortError
from extract.base.files import in_main_tree, json_text, read_json, write_json
from extract.base.progress import log

Point = tuple[int, Mapping[str, float]]  # optimiser step, values by name
_LOGS = Path("logs")
_PROJECT = "retort"  # experiment of MLflow, project of Weights & Biases
_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny", "wandb": "wandb"}
TOOLS = tuple(_PACKAGES)


@dataclass(frozen=True)
class TrainingRecord:
    """Identity of a run, and its past."""

    student: str
    checkpoint: Path  # its folder exists as long as the run can be resumed
    step: int  # done before: of the checkpoint that the run resumes from
    curve: Sequence[Point]  # logged up to that step
    facts: Mapping[str, Any]  # settings and digests

    def read_id(self, tool: str) -> str | None:
        """Return the id of the interrupted run in the tool, None if it had none."""
        file = self._id_file(tool)
        return str(read_json(file)["id"]) if file.is_file() else None

    def keep_id(self, tool: str, run_id: str) -> None:
        """Keep the run's id in the tool for a later resumption."""
        write_json(self._id_file(tool), {"id": run_id})

    def _id_file(self, tool: str) -> Path:
        return self.checkpoint.with_name(f"{tool}.json")


class Curves(Protocol):
    """Record of a run in a tool. Methods raise RetortError if the tool fails."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append points at a step."""
        ...

    def close(self, *, failed: bool) -> None:
        """End the record, as finished or as failed."""
        ...


def check_tool(tool: str) -> None:
    """Raise RetortError if the library of a tool is not installed."""
    if find_spec(tool) is None:
        raise RetortError(f"--log {tool}: the library is not installed; run `pip install {_PACKAGES[tool]}`")


def open_curves(tool: str, run: TrainingRecord) -> Curves:
    """Start or continue a run's record. Raises RetortError if the tool can't be used as it is set up."""
    return _TOOLS[tool](run)


class TensorBoardCurves:
    """Event files of TensorBoard."""

    def __init__(self, run: TrainingRecord) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = in_main_tree(_LOGS / "tensorboard" / run.checkpoint.parent.name)
        known = run.read_id("tensorboard") is not None
        # TensorBoard hides what was logged at later steps: by the interrupted run, or by an earlier one of this name.
        self.writer = SummaryWriter(str(folder), purge_step=run.step + 1 if known else 0)
        if not known:
            self.writer.add_text("run", f"```json\n{json_text(dict(run.facts))}\n```", 0)
            run.keep_id("tensorboard", folder.name)
            _replay(self, run)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a killed run then has all points of its checkpoint

    def close(self, *, failed: bool) -> None:
        self.writer.close()


class MlflowCurves:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in a folder."""

    def __init__(self, run: TrainingRecord) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self.error = MlflowException
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            address = in_main_tree(_LOGS / "mlflow").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow asks for a database
        try:
            self.client = MlflowClient(address)
            known, self.logged = run.read_id("mlflow"), dict[str, int]()
            self.id = known or self._create(run)
            if known is None:
                run.keep_id("mlflow", self.id)
                _replay(self, run)
            else:
                self.client.update_run(self.id, status="RUNNING")
                # Points after the checkpoint stay: the resumed run computes the same ones.
                for name in self.client.get_run(self.id).data.metrics:
                    self.logged[name] = max(point.step for point in self.client.get_metric_history(self.id, name))
        except MlflowException as error:
            raise RetortError(f"--log mlflow: {address} can't be used ({_line(error)})") from None

    def _create(self, run: TrainingRecord) -> str:
        from mlflow.entities import Param

        experiment = self.client.get_experiment_by_name(_PROJECT)
        where = experiment.experiment_id if experiment else self.client.create_experiment(_PROJECT)
        created: str = self.client.create_run(where, run_name=run.student).info.run_id
        self.client.log_batch(created, params=[Param(name, str(value)) for name, value in _flat(run.facts).items()])
        return created

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {name: value for name, value in values.items() if step > self.logged.get(name, -1)}
        try:
            self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in new.items()])
        except self.error as error:
            raise RetortError(f"MLflow takes no more points ({_line(error)})") from None

    def close(self, *, failed: bool) -> None:
        try:
            self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")
        except self.error as error:
            raise RetortError(f"MLflow did not end the run ({_line(error)})") from None


class WandbCurves:
    """A run of Weights & Biases. It sends in the background, so a lost connection does not stop the training."""

    def __init__(self, run: TrainingRecord) -> None:
        import wandb

        folder = os.environ.get("WANDB_DIR") or str(in_main_tree(_LOGS))
        Path(folder).mkdir(parents=True, exist_ok=True)  # wandb would take the system's temporary folder
        known = run.read_id("wandb")
        run_id = known or secrets.token_hex(4)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=run.student,
                id=run_id,
                resume="allow",
                dir=folder,
                config=dict(run.facts),
                settings=wandb.Settings(silent=True, console="off"),  # progress lines are Retort's
            )
        except wandb.Error as error:
            raise RetortError(
                f"--log wandb: {_line(error)}; run `wandb login`, or set WANDB_MODE=offline and send the run later "
                "with `wandb sync`"
            ) from None
        log(f"{run.student}: {self.run.url or self.run.dir}")
        if known is None:
            run.keep_id("wandb", run_id)
            _replay(self, run)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


_TOOLS: dict[str, Callable[[TrainingRecord], Curves]] = {
    "tensorboard": TensorBoardCurves,
    "mlflow": MlflowCurves,
    "wandb": WandbCurves,
}


def _replay(curves: Curves, run: TrainingRecord) -> None:
    """Log the points up to the checkpoint of a run that began without this tool."""
    for step, values in run.curve:
        curves.log(step, values)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with keys joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
