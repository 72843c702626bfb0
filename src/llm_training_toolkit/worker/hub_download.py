"""Downloads hub weights once per node: one rank fetches them, the others wait and read the cache.

Cached weights are used as they are, because a run must not change when the hub does. All nodes use the commit of rank
0. On nodes with a shared HF_HOME the hub client locks every file, so that one node fetches it for all.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from llm_training_toolkit.checkpoint.hub_commit import WEIGHT_PATTERNS
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import NoteEvent
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.worker.spec import WorkerSpec

_LOOK_EVERY = 0.5  # seconds between all-gathers while ranks wait: torch would time out a single long one


def ensure_local_weights(path: str, spec: WorkerSpec, context: RunContext, revision: str = "main") -> str:
    """Return the directory on this node with the weights of a path or hub id; download if needed. Collective.

    `revision` is the branch, tag or commit of a hub id, whose directory is named after the commit. Raises
    CheckpointError on every rank if a node cannot have the weights.
    """
    local = Path(path).expanduser()
    sights = context.all_gather_object((spec.machine, spec.node, local.is_dir()))
    if all(there for _, _, there in sights):
        return str(local)
    if any(there for _, _, there in sights):
        raise CheckpointError(
            f"model.path = {path}: node {_join_node_names(node for _, node, there in sights if not there)} does "
            "not see that "
            "directory: put it on storage that every node shares"
        )
    nodes = [(machine, node) for machine, node, _ in sights]
    fetches = nodes.index(nodes[context.rank]) == context.rank
    commit = _run_on_all_ranks(
        lambda: _find_cached_commit(path, revision) or _download_weights(path, revision) if fetches else "",
        path,
        spec,
        context,
    )[0]
    _run_on_all_ranks(
        lambda: _find_cached_commit(path, commit) or _download_weights(path, commit) if fetches else "",
        path,
        spec,
        context,
    )
    seen = context.all_gather_object((spec.node, bool(_find_cached_commit(path, commit))))
    if not all(there for _, there in seen):
        raise CheckpointError(
            f"model.path = {path}: some ranks of node "
            f"{_join_node_names(node for node, there in seen if not there)} do not see "
            "what another rank there has fetched: give all of them one HF_HOME"
        )
    return str(_find_cached_snapshot(path, commit))


def _join_node_names(nodes: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(nodes))


def _run_on_all_ranks(work: Callable[[], str], path: str, spec: WorkerSpec, context: RunContext) -> list[str]:
    """Run the work on every rank and return all results; an error of one rank is raised on all."""
    done: list[tuple[str, str]] = []

    def run_and_record() -> None:
        try:
            done.append((work(), ""))
        except Exception as error:  # noqa: BLE001 - the edge of a thread: every rank raises it
            said = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            done.append(("", f"{said} (rank {context.rank} on node {spec.node})"))

    start_time, told = time.monotonic(), False
    threading.Thread(
        target=run_and_record, daemon=True, name="fetch-weights"
    ).start()  # not joined if another rank fails
    while True:
        answers = context.all_gather_object(done[0] if done else None)
        failed = next((answer[1] for answer in answers if answer and answer[1]), "")
        if failed:
            raise CheckpointError(failed)
        if None not in answers:
            return [answer[0] for answer in answers if answer]
        if context.is_rank_zero and not told and time.monotonic() - start_time > _LOOK_EVERY:
            told = True
            context.report(NoteEvent(f"fetching {path} from the hub, once a node"))
        context.heartbeat.keepalive(f"fetching the weights, {time.monotonic() - start_time:.0f} s")
        time.sleep(_LOOK_EVERY)


def _find_cached_commit(path: str, revision: str) -> str:
    """Return the commit of a hub id's revision if it is complete in the cache, otherwise ""."""
    try:
        directory = _find_cached_snapshot(path, revision)
    except OSError:
        return ""
    return directory.name if _is_complete_snapshot(directory) else ""


def _find_cached_snapshot(path: str, revision: str) -> Path:
    """Return the cached directory of a revision, complete or not. Raises OSError if it is absent."""
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=WEIGHT_PATTERNS, local_files_only=True))
    except HFValidationError as error:
        raise CheckpointError(f"model.path = {path}: neither a directory here nor an id of the hub") from error


def _download_weights(path: str, revision: str) -> str:
    """Download weights from the hub and return their commit."""
    try:
        directory = Path(snapshot_download(path, revision=revision, allow_patterns=WEIGHT_PATTERNS))
    except (HfHubHTTPError, OSError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"model.path = {path}: no such directory, and the Hugging Face hub did not give it"
            f"{'' if revision == 'main' else f' at revision {revision}'} ({said}). Correct it, "
            "or log in for what is not public: `hf auth login` or HF_TOKEN on the nodes"
        ) from error
    if not _is_complete_snapshot(directory):
        raise CheckpointError(f"model.path = {path}: the hub has no weights of this name as safetensors")
    return directory.name


def _is_complete_snapshot(directory: Path) -> bool:
    """Return whether all weight files named in the index are present."""
    if not (directory / "config.json").is_file():
        return False
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return (directory / "model.safetensors").is_file()
    files = set(json.loads(index.read_text())["weight_map"].values())
    return all((directory / file).is_file() for file in files)
