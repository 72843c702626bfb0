"""Backend of a run: this process, torchrun or Ray; who prepares its data, who trains it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from llm_training_toolkit.config import Config
from llm_training_toolkit.data.prepare.builder import DatasetBuilder
from llm_training_toolkit.data.prepare.document_index import DocumentShard
from llm_training_toolkit.data.prepare.epochs import get_tokenization_spec
from llm_training_toolkit.data.prepare.shards import (
    DoneCallback,
    RenderJob,
    ShardRunner,
    get_shard_directory,
    render_in_process,
)
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.storage import find_storage, storage_errors
from llm_training_toolkit.setup.machine import is_local

_RAY_ENVIRONMENT = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",  # for the places alone, and there was room just before
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver watches for nodes that are taken away
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # ranks that wait for a dead one are ended anyway
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise every line arrives twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
    "RAY_DATA_LOG_LEVEL": "ERROR",  # what it warns of is what was asked for: no progress bars of its own
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # workers without a GPU keep their environment
}
"""Ray Train copies these from the driver to its controller and workers."""


def prepare_environment() -> None:
    """Set what Ray reads when it is imported. What is set already stays."""
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if is_local():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's Train view


def build_shard_runner(config: Config, console: Console) -> ShardRunner:
    """What renders a run's documents: the cluster the run is for, where there is one and the work is worth it."""

    def render_shards(job: RenderJob, shards: Sequence[DocumentShard], done: DoneCallback) -> None:
        left = [shard for shard in shards if not get_shard_directory(job, shard).is_dir()]
        done(sum(shard.stop - shard.first for shard in set(shards) - set(left)))
        if len(left) < 2 or config.cluster.workers == 0 or is_local():
            render_in_process(job, left, done)
            return
        prepare_environment()
        from llm_training_toolkit.launch.ray.data_prep import prepare_on_cluster

        prepare_on_cluster(job, left, done, console)

    return render_shards


def create_dataset_builder(config: Config, console: Console) -> DatasetBuilder:
    """The data of a run, with progress on the console, spread over a cluster where there is one."""
    return DatasetBuilder(
        config, get_tokenization_spec(config), console.update_stage, build_shard_runner(config, console)
    )


def check_cluster_nodes(run: RunDirectory, config: Config, console: Console) -> None:
    """Refuse nodes of a cluster that could not work on the run."""
    if is_local():
        return
    prepare_environment()
    from llm_training_toolkit.launch.ray.preflight import check_nodes

    check_nodes(run, config, console)


def launch_training(run: RunDirectory, config: Config, console: Console) -> dict[str, Any]:
    """Train a run that is written down, with Ray or without: `{"status", "step"}`."""
    with storage_errors():
        find_storage(run.path).flush()  # ranks on other machines read it
    if config.cluster.workers == 0:
        from llm_training_toolkit.launch.torchrun import run_without_ray

        return run_without_ray(run, config, console)
    prepare_environment()
    from llm_training_toolkit.launch.ray.run import run_on_ray

    return run_on_ray(run, config, console)
