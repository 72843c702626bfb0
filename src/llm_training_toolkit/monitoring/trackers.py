"""Receivers of metrics beside the run directory: Weights & Biases, MLflow, and the exporter for Prometheus.

Servers are written from a thread. A resumed run continues the same curves: the id that its attempts share names it
in W&B and tags it in MLflow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from llm_training_toolkit.config import Config, redact_config
from llm_training_toolkit.config.run_identity import flatten_config
from llm_training_toolkit.config.schema import MlflowConfig, WandbConfig
from llm_training_toolkit.config.section import parse_duration_seconds
from llm_training_toolkit.monitoring.background_sink import BackgroundSink
from llm_training_toolkit.monitoring.logs import RANK_LOGGER
from llm_training_toolkit.monitoring.metrics import MetricSink, ScalarValues
from llm_training_toolkit.runs.directory import RunDirectory

RUN_ID_TAG = "llm_training_toolkit.run_id"
_MAX_PARAMETER_LENGTH = 6000  # of a value, in MLflow
_BATCH = 100  # parameters of one request, MLflow's maximum
_BUSY = frozenset({408, 429})  # HTTP states below 500 after which a later request may succeed
_WANDB_SERVICE = "wandb-core"


def open_trackers(
    config: Config, run: RunDirectory, run_id: str, export: Callable[[ScalarValues], None] | None
) -> list[MetricSink]:
    """Open the sinks that `monitoring` asks for.

    export: exporter of gauges, None without Ray.
    """
    tracked = TrackedRun(run.name, run.path, run_id, read_settings(config))
    wait = parse_duration_seconds(config.monitoring.close_timeout)
    assert wait is not None, "the schema takes durations alone"
    asked: list[MetricSink] = []
    if (wandb := config.monitoring.wandb) is not None:
        asked.append(BackgroundSink(WandbClient(wandb, tracked), wait))
    if (mlflow := config.monitoring.mlflow) is not None:
        asked.append(BackgroundSink(MlflowClient(mlflow, tracked), wait))
    if export is not None and config.monitoring.prometheus:
        asked.append(Gauges(export))
    return asked


def read_settings(config: Config) -> dict[str, Any]:
    """Return the values of a configuration by dotted key, addresses redacted and without `cluster.env`.

    The section may hold the tracker's own key.
    """
    values = flatten_config(redact_config(config))
    return {key: value for key, (_, value) in values.items() if key != "cluster.env"}


class TrackedRun(NamedTuple):
    """Facts about a run that trackers keep. `id` is shared by its attempts."""

    name: str
    directory: Path
    id: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class WandbClient:
    """Client of Weights & Biases."""

    config: WandbConfig
    run: TrackedRun
    name = "W&B"

    def open(self) -> WandbTracker:
        """Begin or resume the run. Raises what the client raises, ImportError without it."""
        import wandb  # noqa: PLC0415 - an extra package

        opened = wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            name=self.run.name,
            id=self.run.id,
            resume="allow",
            mode=self.config.mode,
            dir=str(self.run.directory),
            config=dict(self.run.settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
        opened.define_metric("*", step_metric="step")
        return WandbTracker(opened)

    def is_temporary(self, error: Exception) -> bool:
        """Return whether the connection failed; a missing package or key stays missing."""
        return type(error).__name__ in {"CommError", "WandbServiceConnectionError"} or isinstance(error, OSError)

    def abandon(self) -> None:
        """Kill the client's service, for which the client would wait without a limit when Python exits."""
        import wandb  # noqa: PLC0415 - an extra package

        for child in psutil.Process().children():
            if child.name() == _WANDB_SERVICE:
                child.kill()
        try:
            wandb.teardown()  # removes the client's exit hook
        except (Exception, SystemExit) as error:  # noqa: BLE001 - SystemExit has the code of the killed service
            RANK_LOGGER.info("W&B was given up: %s: %s", type(error).__name__, error)


class WandbTracker:
    """Run of Weights & Biases. Steps are a metric of their own, since those of a lost attempt are logged again."""

    def __init__(self, opened: Any) -> None:  # noqa: ANN401 - wandb.Run
        self._run = opened

    def log(self, step: int, values: ScalarValues, moment: float) -> None:
        """Log the scalars of a step."""
        self._run.log({"step": step, "_timestamp": moment, **values})

    def finish(self, *, failed: bool) -> None:
        """Upload the rest."""
        self._run.finish(exit_code=int(failed))


@dataclass(frozen=True)
class MlflowClient:
    """Client of an MLflow server or database."""

    config: MlflowConfig
    run: TrackedRun
    name = "MLflow"

    def open(self) -> MlflowTracker:
        """Begin or resume the run. Raises what the client raises, ImportError without it."""
        from mlflow import MlflowClient as Client  # noqa: PLC0415 - an extra package

        client = Client(tracking_uri=self.config.tracking_uri)
        found = client.get_experiment_by_name(self.config.experiment)
        experiment = found.experiment_id if found else client.create_experiment(self.config.experiment)
        begun = client.search_runs([experiment], f"tags.`{RUN_ID_TAG}` = '{self.run.id}'", max_results=1)
        known = begun[0] if begun else client.create_run(experiment, None, {RUN_ID_TAG: self.run.id}, self.run.name)
        client.update_run(known.info.run_id, status="RUNNING")
        if not known.data.params:  # a start before may have failed right after its first request
            self._log_parameters(client, known.info.run_id)
        return MlflowTracker(client, known.info.run_id)

    def is_temporary(self, error: Exception) -> bool:
        """Return whether the server was out of reach or busy; MLflow gives lost connections the state 500."""
        get_state = getattr(error, "get_http_status_code", None)
        if get_state is None:
            return isinstance(error, OSError)
        state = get_state()
        return state >= 500 or state in _BUSY

    def abandon(self) -> None:
        """Do nothing: the thread ends with the process."""

    def _log_parameters(self, client: Any, run_id: str) -> None:  # noqa: ANN401 - mlflow.MlflowClient
        from mlflow.entities import Param  # noqa: PLC0415 - an extra package

        parameters = [Param(name, str(value)[:_MAX_PARAMETER_LENGTH]) for name, value in self.run.settings.items()]
        for start in range(0, len(parameters), _BATCH):
            client.log_batch(run_id, params=parameters[start : start + _BATCH])


class MlflowTracker:
    """Run of an MLflow server or database."""

    def __init__(self, client: Any, run_id: str) -> None:  # noqa: ANN401 - mlflow.MlflowClient
        self._client, self._id = client, run_id

    def log(self, step: int, values: ScalarValues, moment: float) -> None:
        """Log the scalars of a step."""
        from mlflow.entities import Metric  # noqa: PLC0415 - an extra package

        metrics = [Metric(name, value, int(moment * 1e3), step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, *, failed: bool) -> None:
        """Mark the run as ended, until it is resumed."""
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


class Gauges:
    """Sink of the gauges that the launcher exports for Prometheus."""

    name = "Prometheus"

    def __init__(self, export: Callable[[ScalarValues], None]) -> None:
        self._export = export

    def write(self, step: int, values: ScalarValues) -> None:
        """Set the gauges to the scalars of a step."""
        self._export({"step": step, **values})

    def add_text(self, step: int, name: str, content: str) -> None:
        """Ignore texts, which are for TensorBoard."""

    def sync(self) -> None:
        """Do nothing: gauges are sent every few seconds."""

    def close(self, *, failed: bool = False) -> None:
        """Do nothing: gauges end with their worker."""
