"""Weights of the hub on every node: one rank of each node fetches them, the others wait and read what lies there.

What is there already is taken as it is, because a run must not change when the hub does, and all nodes take the
revision that rank 0 has. Where nodes share one HF_HOME the hub's client locks every file: one fetches it for all.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.worker.spec import WorkerSpec

_FILES = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
"""Of a repository: no second copy of the weights in another format."""
_LOOK_EVERY = 0.5
"""Seconds between two exchanges on whether all have what they need: a long one would be given up by torch."""


def ensure_local_weights(path: str, place: WorkerSpec, context: RunContext) -> str:
    """The directory on this node with the weights at a path or of a hub id, fetched if need be. Collective.

    Raises CheckpointError, on every rank, where a node cannot have them.
    """
    local = Path(path).expanduser()
    sights = context.all_gather_object((place.machine, place.node, local.is_dir()))
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
    revision = _run_on_all_ranks(
        lambda: _find_cached_revision(path) or _download_weights(path) if fetches else "", path, place, context
    )[0]
    _run_on_all_ranks(
        lambda: _find_cached_revision(path, revision) or _download_weights(path, revision) if fetches else "",
        path,
        place,
        context,
    )
    seen = context.all_gather_object((place.node, bool(_find_cached_revision(path, revision))))
    if not all(there for _, there in seen):
        raise CheckpointError(
            f"model.path = {path}: some ranks of node "
            f"{_join_node_names(node for node, there in seen if not there)} do not see "
            "what another rank there has fetched: give all of them one HF_HOME"
        )
    return str(_find_cached_snapshot(path, revision))


def _join_node_names(nodes: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(nodes))


def _run_on_all_ranks(work: Callable[[], str], path: str, place: WorkerSpec, context: RunContext) -> list[str]:
    """What the work gives on every rank, once all have done theirs; what one raises is raised on all of them."""
    done: list[tuple[str, str]] = []

    def run_and_record() -> None:
        try:
            done.append((work(), ""))
        except Exception as error:  # noqa: BLE001 - the edge of a thread: every rank raises it
            said = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            done.append(("", f"{said} (rank {context.rank} on node {place.node})"))

    began, told = time.monotonic(), False
    threading.Thread(
        target=run_and_record, daemon=True, name="fetch-weights"
    ).start()  # nobody waits for it when another fails
    while True:
        answers = context.all_gather_object(done[0] if done else None)
        failed = next((answer[1] for answer in answers if answer and answer[1]), "")
        if failed:
            raise CheckpointError(failed)
        if None not in answers:
            return [answer[0] for answer in answers if answer]
        if context.is_rank_zero and not told and time.monotonic() - began > _LOOK_EVERY:
            told = True
            context.report({"kind": "note", "message": f"fetching {path} from the hub, once a node"})
        context.heartbeat.keepalive(f"fetching the weights, {time.monotonic() - began:.0f} s")
        time.sleep(_LOOK_EVERY)


def _find_cached_revision(path: str, revision: str = "main") -> str:
    """The revision of a hub id that lies here whole; empty where there is none."""
    try:
        directory = _find_cached_snapshot(path, revision)
    except OSError:
        return ""
    return directory.name if _is_complete_snapshot(directory) else ""


def _find_cached_snapshot(path: str, revision: str) -> Path:
    """The directory of a revision here, whole or not. Raises OSError where there is none."""
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=_FILES, local_files_only=True))
    except HFValidationError as error:
        raise CheckpointError(f"model.path = {path}: neither a directory here nor an id of the hub") from error


def _download_weights(path: str, revision: str = "main") -> str:
    """Fetch weights from the hub; the revision that came."""
    try:
        directory = Path(snapshot_download(path, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"model.path = {path}: no such directory, and the Hugging Face hub did not give it ({said}). Correct it, "
            "or log in for what is not public: `hf auth login` or HF_TOKEN on the nodes"
        ) from error
    if not _is_complete_snapshot(directory):
        raise CheckpointError(f"model.path = {path}: the hub has no weights of this name as safetensors")
    return directory.name


def _is_complete_snapshot(directory: Path) -> bool:
    """Whether the weights are there with every file that their index names."""
    if not (directory / "config.json").is_file():
        return False
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return (directory / "model.safetensors").is_file()
    files = set(json.loads(index.read_text())["weight_map"].values())
    return all((directory / file).is_file() for file in files)
