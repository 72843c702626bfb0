"""Data preparation on the CPUs of a Ray cluster, before any worker exists: signatures, then rendering by shards."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llm_training_toolkit.data.prepare.document_index import DocumentShard, list_all_sources
from llm_training_toolkit.data.prepare.min_hash import Signature, compute_signature, load_min_hash
from llm_training_toolkit.data.prepare.shards import DoneCallback, RenderJob, ShardWriter, render_in_process
from llm_training_toolkit.data.sources import STANDARD_LIBRARY, is_uri
from llm_training_toolkit.data.types import Document
from llm_training_toolkit.errors import DataError, LaunchError, ToolkitError
from llm_training_toolkit.launch.ray.cluster import connect_to_cluster
from llm_training_toolkit.monitoring.console import Console

_CHECK_TIMEOUT_SECONDS = 60.0
# A batch of signatures: a quarter of a second of one CPU, so that a task's own milliseconds do not count.
_DOCUMENTS_PER_BATCH = 512
_CHARACTERS_PER_BATCH = 2 << 20
_BATCHES_AHEAD = 32


def prepare_on_cluster(job: RenderJob, shards: Sequence[DocumentShard], done: DoneCallback, console: Console) -> None:
    """Render shards on the cluster if all its nodes see sources and cache, otherwise in this process.

    Raises DataError for bad documents, LaunchError if Ray fails.
    """
    with connect_to_cluster(console):
        blind = _format_nodes_missing_paths(job)
        if not blind:
            _render_with_ray_data(job, shards, done)
            return
    console.print_line(f"note: preparing on this machine alone, because {blind}")
    render_in_process(job, shards, done)


def _render_with_ray_data(job: RenderJob, shards: Sequence[DocumentShard], done: DoneCallback) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    most = max(1, min(len(shards), int(ray.cluster_resources().get("CPU", 1))))
    work = ray.data.from_items([shard._asdict() for shard in shards], override_num_blocks=len(shards))
    processes = ray.data.ActorPoolStrategy(min_size=1, max_size=most)
    finished = work.map(_ShardRenderer, fn_constructor_args=(job, str(Path.cwd())), compute=processes, num_cpus=1)
    try:
        for row in finished.iter_rows():
            done(int(row["documents"]))
    except ray.exceptions.RayError as error:
        raise _find_root_error(error) from error


def sign_on_cluster(
    documents: Iterator[Document], rows: int, console: Console
) -> Iterator[tuple[Document, Signature | None]]:
    """Yield documents, in their order, with signatures that the cluster's CPUs compute; `rows` as in `get_band_rows`.

    Reading waits while `_BATCHES_AHEAD` batches are under way, so memory does not grow with the documents. Raises
    DataError for a node whose signatures would differ, LaunchError if Ray fails.
    """
    sign = ray.remote(num_cpus=1)(_sign_texts)
    version = load_min_hash().ALGORITHM_VERSION
    under_way: deque[tuple[list[Document], Any]] = deque()
    with connect_to_cluster(console):
        for batch in _batch_by_size(documents):
            under_way.append((batch, sign.remote([document.text for document in batch], rows, version)))
            if len(under_way) == _BATCHES_AHEAD:
                yield from _collect_signatures(*under_way.popleft())
        while under_way:
            yield from _collect_signatures(*under_way.popleft())


def _collect_signatures(batch: list[Document], ref: Any) -> Iterator[tuple[Document, Signature | None]]:  # noqa: ANN401 - an ObjectRef of Ray, which is untyped
    try:
        signatures: list[Signature | None] = ray.get(ref)
    except ray.exceptions.RayError as error:
        raise _find_root_error(error) from error
    return zip(batch, signatures, strict=True)


def _sign_texts(texts: Sequence[str], rows: int, version: Any) -> list[Signature | None]:  # noqa: ANN401 - rensa is untyped
    """Compute signatures in a task. Raises DataError if this node's library hashes otherwise than the driver's."""
    try:
        if (own := load_min_hash().ALGORITHM_VERSION) != version:
            raise DataError(
                f"data.near_duplicates: rensa's hashes are of version {own}, and of version {version} on the machine "
                "of the command. Install the rensa of requirements.txt on every node."
            )
        return [compute_signature(text, rows) for text in texts]
    except DataError as error:
        raise DataError(f"{socket.gethostname()}: {error}") from error


def _batch_by_size(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _DOCUMENTS_PER_BATCH or characters >= _CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _ShardRenderer:
    """Actor that renders shards on one core; the other cores run actors of their own."""

    def __init__(self, job: RenderJob, directory: str) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if Path(directory).is_dir():
            os.chdir(directory)  # keeps relative paths valid
        self._writer = ShardWriter(job)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, int]:
        documents: list[int] = []
        self._writer.write_shard(
            DocumentShard(int(row["source"]), int(row["first"]), int(row["stop"])), documents.append
        )
        return {"documents": sum(documents)}


def _find_root_error(error: BaseException) -> ToolkitError:
    """Return the ToolkitError inside Ray's error, else a LaunchError with Ray's last line."""
    inside: BaseException | None = error
    while inside is not None:
        if isinstance(inside, ToolkitError):
            return inside
        inside = getattr(inside, "cause", None) or inside.__cause__
    return LaunchError(f"preparing the data on the cluster failed: {str(error).strip().splitlines()[-1]}")


def _format_nodes_missing_paths(job: RenderJob) -> str:
    """Format the nodes that miss needed paths, "" if every node sees all."""
    needed = [str(job.document_index), str(job.tokenizer), *_list_local_paths(job)]
    look = ray.remote(num_cpus=0)(_find_missing_paths)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    refs = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(needed)
        for node in nodes
    ]
    try:
        answers = ray.get(refs, timeout=_CHECK_TIMEOUT_SECONDS)
    except ray.exceptions.RayError as error:
        return f"a node does not answer ({type(error).__name__})"
    return "; ".join(f"{host} does not see {', '.join(paths)}" for host, paths in answers if paths)


def _find_missing_paths(paths: Sequence[str]) -> tuple[str, list[str]]:
    return socket.gethostname(), [path for path in paths if not Path(path).exists()]


def _list_local_paths(job: RenderJob) -> Iterator[str]:
    """Yield the sources' paths on disk; for a glob, the directory before its first pattern."""
    for source in list_all_sources(job.data):
        if source.path == STANDARD_LIBRARY or is_uri(source.path):
            continue
        path = Path(source.path).expanduser().absolute()
        while any(sign in str(path) for sign in "*?[") and not path.exists():
            path = path.parent
        yield str(path)
