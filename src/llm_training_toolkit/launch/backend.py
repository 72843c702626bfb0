"""Backend selection for data preparation and training: this process, torchrun or Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_training_toolkit.config import Config
from llm_training_toolkit.data.prepare.builder import DatasetBuilder
from llm_training_toolkit.data.prepare.document_index import DocumentShard
from llm_training_toolkit.data.prepare.epochs import get_tokenization_spec
from llm_training_toolkit.data.prepare.min_hash import Signature, SignatureRunner, sign_in_process
from llm_training_toolkit.data.prepare.shards import (
    DoneCallback,
    RenderJob,
    ShardRunner,
    get_shard_directory,
    render_in_process,
)
from llm_training_toolkit.data.types import Document
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.storage.open import storage_errors
from llm_training_toolkit.runs.user_directory import create_user_directory
from llm_training_toolkit.setup.machine import is_local

# Ray adds up to 68 characters (/ray/session_<date>_<pid>/sockets/plasma_store) to a socket's 107.
_MAX_RAY_TMPDIR = 38
# Ray Train copies these variables from the driver to its controller and workers.
_RAY_ENVIRONMENT = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",  # covers placement only; capacity was checked just before
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver watches for preempted nodes itself
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # ranks blocked on a dead one are killed anyway
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise every line arrives twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # keeps relative paths valid
    "RAY_DATA_LOG_LEVEL": "ERROR",  # it would warn about its progress bars, disabled on purpose
    "PYTHONSAFEPATH": "1",  # Ray's own processes do not import modules of the current folder
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # keeps the environment of workers without a GPU
}


def prepare_environment() -> None:
    """Set the variables that Ray reads at import; keep those already set."""
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if is_local():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if "RAY_TMPDIR" not in os.environ:  # Ray makes its session directories writable for everybody
            os.environ["RAY_TMPDIR"] = str(create_user_directory("ltt-ray", max_length=_MAX_RAY_TMPDIR))
        protect_ray_token()
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's Train view


def protect_ray_token() -> None:
    """Make the token of Ray's clusters readable for this user alone, before Ray writes it with mode 644.

    Whoever reads it can run code on every cluster that uses it.
    """
    folder = Path.home() / ".ray"
    with suppress(OSError):  # no home, or of another user: then Ray says that it cannot write its token
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        (folder / "auth_token").chmod(0o600)


def build_shard_runner(config: Config, console: Console) -> ShardRunner:
    """Return the renderer of a run's documents: its cluster if two or more shards are left, else this process."""

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


def build_signature_runner(config: Config, console: Console) -> SignatureRunner:
    """Return the signer of a run's documents, for near-duplicates: its cluster if there is one, else this process."""
    if config.cluster.workers == 0 or is_local():
        return sign_in_process

    def sign_documents(documents: Iterator[Document], rows: int) -> Iterator[tuple[Document, Signature | None]]:
        prepare_environment()
        from llm_training_toolkit.launch.ray.data_prep import sign_on_cluster

        return sign_on_cluster(documents, rows, console)

    return sign_documents


def create_dataset_builder(config: Config, console: Console) -> DatasetBuilder:
    """Return the builder of a run's dataset: progress on the console, rendering on the cluster if there is one."""
    return DatasetBuilder(
        config,
        get_tokenization_spec(config),
        console.update_stage,
        build_shard_runner(config, console),
        build_signature_runner(config, console),
    )


def check_cluster_nodes(run: RunDirectory, config: Config, console: Console) -> None:
    """Check that the nodes of a cluster, if there is one, can work on the run. Raises LaunchError."""
    if is_local():
        return
    prepare_environment()
    from llm_training_toolkit.launch.ray.preflight import check_nodes

    check_nodes(run, config, console)


def launch_training(run: RunDirectory, config: Config, console: Console) -> dict[str, Any]:
    """Train a run whose files are written, with or without Ray; return `{"status", "step"}`."""
    with storage_errors():
        run.storage.flush()  # ranks on other machines read the run's files
    if config.cluster.workers == 0:
        from llm_training_toolkit.launch.torchrun import run_without_ray

        return run_without_ray(run, config, console)
    prepare_environment()
    from llm_training_toolkit.launch.ray.run import run_on_ray

    return run_on_ray(run, config, console)
