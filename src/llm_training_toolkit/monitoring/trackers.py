"""Metric sinks that teams look at: Weights & Biases, MLflow, and Ray's Prometheus exporter.

Each is opened in the background and asked for by a section of `monitoring`. A resumed run goes on with the same curves:
the id that its attempts share names it in W&B and tags it in MLflow.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from llm_training_toolkit.config import Config, dump_config_json
from llm_training_toolkit.config.schema import MlflowConfig, WandbConfig
from llm_training_toolkit.monitoring.background_sink import BackgroundSink
from llm_training_toolkit.monitoring.metrics import MetricSink, ScalarValues
from llm_training_toolkit.runs.directory import RunDirectory

RUN_ID_TAG = "llm_training_toolkit.run_id"
_MAX_PARAMETER_LENGTH = 6000  # of a value, in MLflow
_BATCH = 100  # parameters of one request, MLflow's maximum


def open_trackers(
    config: Config, run: RunDirectory, run_id: str, export: Callable[[ScalarValues], None] | None
) -> list[MetricSink]:
    """Open the sinks that `monitoring` asks for, those of servers each in a thread of its own.

    export: exporter of gauges, None without Ray.
    """
    settings = flatten_config(config)
    asked: list[MetricSink] = []
    if (wandb := config.monitoring.wandb) is not None:
        asked.append(BackgroundSink(Wandb.name, partial(Wandb, wandb, run, run_id, settings)))
    if (mlflow := config.monitoring.mlflow) is not None:
        asked.append(BackgroundSink(Mlflow.name, partial(Mlflow, mlflow, run, run_id, settings)))
    if export is not None and config.monitoring.prometheus:
        asked.append(Gauges(export))
    return asked


def flatten_config(config: Config) -> dict[str, Any]:
    """Return the values of a configuration by dotted key, with addresses and secrets redacted as in resolved.json."""
    return dict(_flatten(json.loads(dump_config_json(config)), ""))


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Wandb:
    """Sink of Weights & Biases. Steps are a metric of their own, since those of a lost attempt are logged again."""

    name = "W&B"

    def __init__(self, config: WandbConfig, run: RunDirectory, run_id: str, settings: Mapping[str, Any]) -> None:
        import wandb  # noqa: PLC0415 - an extra package

        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=run.name,
            id=run_id,
            resume="allow",
            mode=config.mode,
            dir=str(run.path),
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: ScalarValues) -> None:
        """Log the scalars of a step."""
        self._run.log({"step": step, **values})

    def add_text(self, step: int, name: str, content: str) -> None:
        """Ignore texts, which are for TensorBoard."""

    def sync(self) -> None:
        """Do nothing: the client writes its own log."""

    def close(self) -> None:
        """Upload the rest."""
        self._run.finish()


class Mlflow:
    """Sink of an MLflow server or database."""

    name = "MLflow"

    def __init__(self, config: MlflowConfig, run: RunDirectory, run_id: str, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient  # noqa: PLC0415 - an extra package

        self._client = MlflowClient(tracking_uri=config.tracking_uri)
        found = self._client.get_experiment_by_name(config.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(config.experiment)
        begun = self._client.search_runs([experiment], f"tags.`{RUN_ID_TAG}` = '{run_id}'", max_results=1)
        if begun:
            self._id = begun[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(experiment, tags={RUN_ID_TAG: run_id}, run_name=run.name).info.run_id
            self._log_parameters(settings)

    def write(self, step: int, values: ScalarValues) -> None:
        """Log the scalars of a step."""
        from mlflow.entities import Metric  # noqa: PLC0415 - an extra package

        now = int(time.time() * 1e3)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def add_text(self, step: int, name: str, content: str) -> None:
        """Ignore texts, which are for TensorBoard."""

    def sync(self) -> None:
        """Do nothing: every request is complete."""

    def close(self) -> None:
        """Mark the run as finished, until it is resumed."""
        self._client.set_terminated(self._id)

    def _log_parameters(self, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param  # noqa: PLC0415 - an extra package

        parameters = [Param(name, str(value)[:_MAX_PARAMETER_LENGTH]) for name, value in settings.items()]
        for start in range(0, len(parameters), _BATCH):
            self._client.log_batch(self._id, params=parameters[start : start + _BATCH])


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

    def close(self) -> None:
        """Do nothing: gauges end with their worker."""
