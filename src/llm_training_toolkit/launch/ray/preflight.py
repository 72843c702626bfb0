"""Preflight check of the cluster's nodes, before anything is prepared: storage, weights, versions."""

from __future__ import annotations

import io
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llm_training_toolkit import __version__
from llm_training_toolkit.config import Config
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.data.prepare.dataset_info import get_cache_directory
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.ray import nodes
from llm_training_toolkit.launch.ray.capacity import AutoscalerClient, CapacityWaiter
from llm_training_toolkit.launch.ray.cluster import connect_to_cluster
from llm_training_toolkit.launch.ray.resources import ClusterNode, build_resource_request, has_room_for_worker
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.storage.open import find_store_problem
from llm_training_toolkit.setup.machine import find_attention_problem, list_attention_kinds

_NODE_TIMEOUT_SECONDS = 60.0  # includes the start of a process; slower nodes are skipped, later stages see them
_STAGE = "looking at the nodes"
NodeFindings = tuple[str, list[str | None], list[str], str | None, str | None]  # of `inspect_node`


def check_nodes(run: RunDirectory, config: Config, console: Console) -> None:
    """Check the capacity, and every node that can hold a worker.

    Raises LaunchError if the run can never be placed, or with everything that would fail on the nodes later.
    """
    address = run.uri
    store = address if is_uri(address) else ""
    folders = ({} if store else {"run.dir": run.path}) | {"data.cache": get_cache_directory(config)}
    with connect_to_cluster(console):
        console.update_stage(_STAGE, 0, 1)
        resource_request = build_resource_request(
            config, ray.cluster_resources().get("GPU", 0.0), Console(io.StringIO())
        )  # silent: the note is printed at the start
        CapacityWaiter(config, resource_request, AutoscalerClient(resource_request), console).check_feasibility()
        living = [
            node for node in nodes.alive_nodes() if has_room_for_worker(node.total, resource_request.worker_resources)
        ]
        attention = (
            list_attention_kinds(config) if "GPU" in resource_request.worker_resources else ()
        )  # CPUs need no package
        with _create_marker_files(folders.values()) as mark:
            problems = list(
                _find_node_problems(
                    living,
                    folders,
                    NodeCheck(store, config.cluster.env, mark, _list_read_directories(config), attention),
                )
            )
        console.update_stage(_STAGE, 1, 1)
    if problems:
        raise LaunchError("not every node can work on this run:\n" + "\n".join(f"  {problem}" for problem in problems))


def _list_read_directories(config: Config) -> dict[str, str]:
    """Return the directories on this machine that every worker reads, by field. A hub id is fetched on each node.

    Paths stay as given: relative ones belong to the folder that Ray gives to every node.
    """
    given = {"model.path": config.model.path, "model.init_from": config.model.init_from}
    local = {field: Path(path).expanduser() for field, path in given.items() if path is not None}
    return {field: str(path) for field, path in local.items() if path.is_dir()}


@contextmanager
def _create_marker_files(folders: Iterable[Path]) -> Iterator[str]:
    """Create a uniquely named file in every folder during the check; yield its name."""
    mark = f".node-check-{secrets.token_hex(8)}"
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / mark).touch()
        yield mark
    finally:
        for folder in folders:
            (folder / mark).unlink(missing_ok=True)


@dataclass(frozen=True)
class NodeCheck:
    """Inputs of a node's check, besides the folders it writes to."""

    store: str
    """URI of a run in an object store, "" for one in a folder."""
    environment: Mapping[str, str]
    """`cluster.env`, which may contain the store's keys."""
    mark: str
    """Name of the marker file in every folder."""
    read: Mapping[str, str]
    """Read-only directories, by field."""
    attention: tuple[str, ...]
    """Kinds of attention, which may need packages on every node."""


def _find_node_problems(living: Sequence[ClusterNode], folders: Mapping[str, Path], check: NodeCheck) -> Iterator[str]:
    """Yield the problems, one line per node and folder."""
    inspect = ray.remote(num_cpus=0, max_retries=0)(inspect_node)
    # A process with its own environment takes a second, so only for a store, which may need the keys in it.
    environment = {"runtime_env": {"env_vars": dict(check.environment)}} if check.store and check.environment else {}
    pending_checks = {
        inspect.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False), **environment).remote(
            [str(folder) for folder in folders.values()],
            check.mark,
            list(check.read.values()),
            check.store,
            check.attention,
        ): node.address
        for node in living
    }
    answered, _ = ray.wait(list(pending_checks), num_returns=len(pending_checks), timeout=_NODE_TIMEOUT_SECONDS)
    for answer in answered:
        address = pending_checks[answer]
        try:
            findings = ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            cause = f"{type(error.cause).__name__}: {error.cause}"
            yield f"node {address} cannot run the toolkit ({cause}): install the same version there"
        except ray.exceptions.RayError:
            continue  # the node was lost meanwhile; the start of the workers sees that too
        else:
            yield from _iter_node_problems(address, findings, folders, check)


def _iter_node_problems(
    address: str, findings: NodeFindings, folders: Mapping[str, Path], check: NodeCheck
) -> Iterator[str]:
    """Yield the problems in what `inspect_node` returned from one node."""
    version, folder_problems, missing_paths, store_problem, attention_problem = findings
    if version != __version__:
        yield f"node {address} has version {version} of the toolkit, this machine {__version__}: install the same"
    if attention_problem:
        yield f"node {address} cannot compute {attention_problem}"
    if store_problem:
        yield f"node {address} does not reach run.dir: {store_problem}"
    for (field, folder), problem in zip(folders.items(), folder_problems, strict=True):
        if problem:
            yield f"node {address} {problem} ({field} = {folder}): it must be storage that every node shares"
    for field, path in check.read.items():
        if path in missing_paths:
            yield f"node {address} does not see {field} = {path}: put it where every node reads it"


def inspect_node(
    folders: Sequence[str], mark: str, read: Sequence[str], store: str, attention: Sequence[str]
) -> NodeFindings:
    """Return this node's version, and problems, None if there is none: of each folder, of the store and of attention.

    The third are the missing paths. `folders` are written to, `read` is only read; `store` is the URI of a run, "" for
    one in a folder. A node that has no GPU yet is left to the workers: only packages are looked for.
    """
    folder_problems = [_find_folder_problem(Path(folder), mark) for folder in folders]
    # An unmounted disk leaves an empty folder.
    missing_paths = [path for path in read if next(Path(path).glob("*"), None) is None]
    found = {kind: find_attention_problem(kind, gpu=True) for kind in attention}
    attention_problem = "; ".join(
        f"model.attn_implementation = {kind}: {problem}" for kind, problem in found.items() if problem
    )
    return (
        __version__,
        folder_problems,
        missing_paths,
        find_store_problem(store) if store else None,
        attention_problem or None,
    )


def _find_folder_problem(folder: Path, mark: str) -> str | None:
    if not (folder / mark).is_file():
        return "does not see what was just written"
    own = folder / f"{mark}-{secrets.token_hex(8)}"
    try:
        own.touch()
        own.unlink()
    except OSError as error:
        return f"cannot write: {error.strerror}"
    return None
