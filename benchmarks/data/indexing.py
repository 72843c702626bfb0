"""What the toolkit knows of many documents before any token is read: who they are, where they lie, how they are packed.

    python indexing.py DOCUMENTS

The documents are lines of a few words in one file. They are surveyed as by `ltt prepare`: read, hashed, compared. Then
lengths are made up for them, cut as by `overlong: split`, indexed in shards of ten million tokens (without writing
tokens), joined to one index, and packed from it in windows into a plan on disk. Prints what each part took, and the
most memory of the whole process, as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from lengths import LENGTH, Integers, chunks_of, lengths_of
from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.data.prepare.arrow_store import ExampleStore, join_examples, write_columns
from llm_training_toolkit.data.prepare.document_index import DocumentIndex, build_document_index
from llm_training_toolkit.data.prepare.packing import PackingPlan, pack_in_windows

BATCH_TOKENS = 1 << 20
SHARD_TOKENS = 10 * BATCH_TOKENS
NO_TOKENS = pa.record_batch({"token": pa.array([], pa.uint32())})


def write_lines(documents: int, folder: Path) -> None:
    """Write so many documents."""
    with (folder / "documents.jsonl").open("w") as file:
        file.writelines(f'{{"text": "document {number}"}}\n' for number in range(documents))


def document_index(documents: int, folder: Path) -> None:
    """Read, hash and compare them."""
    place = folder / "documents"
    source = {"path": str(folder / "documents.jsonl"), "format": "text"}
    data = DataConfig.model_validate({"sequence_length": LENGTH, "sources": [source], "eval": {"fraction": 0.01}})
    place.mkdir()
    build_document_index(data, place, lambda _done: None)
    assert len(DocumentIndex.read(place).sources) == documents


def index(documents: int, folder: Path) -> None:
    """The index of their chunks, as rendering in shards leaves it, joined to one."""
    document, chunks = chunks_of(lengths_of(documents))
    begins = np.cumsum(chunks) - chunks
    bounds = np.flatnonzero(np.diff(begins // SHARD_TOKENS, prepend=-1, append=-1))
    parts = []
    for first, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        parts.append(folder / f"shard{first}")
        write_shard(parts[-1], document[first:stop], chunks[first:stop])
    (folder / "tokens").mkdir()
    join_examples(parts, folder / "tokens", lambda _file, _to: None)


def write_shard(directory: Path, document: Integers, chunks: Integers) -> None:
    """One shard: its index, and a file of as many record batches as its tokens would need, empty."""
    directory.mkdir()
    begins = np.cumsum(chunks) - chunks
    batch = begins // BATCH_TOKENS
    columns = {"source": np.zeros(len(chunks), np.int64), "document": document, "batch": batch}
    columns |= {"start": begins - begins[np.searchsorted(batch, batch)], "length": chunks, "targets": chunks - 1}
    write_columns(directory / "examples.arrow", columns)
    with pa.OSFile(str(directory / "tokens.arrow"), "wb") as sink, pa.ipc.new_file(sink, NO_TOKENS.schema) as writer:
        for _ in range(int(batch[-1]) + 1):
            writer.write_batch(NO_TOKENS)


def packed(folder: Path) -> None:
    """The plan of that index."""
    examples = ExampleStore(folder / "tokens")
    (folder / "plan").mkdir()
    plan = pack_in_windows(examples.batch, examples.length, LENGTH, targets=examples.targets)
    plan.write(folder / "plan")


def seconds(work: Callable[..., object], *given: object) -> float:
    """How long something takes."""
    start = time.perf_counter()
    work(*given)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    documents = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_lines(documents, folder)
        found = {"documents": documents, "survey": seconds(document_index, documents, folder)}
        found |= {"index": seconds(index, documents, folder), "pack": seconds(packed, folder)}
        found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        plan, lengths = PackingPlan.read(folder / "plan"), ExampleStore(folder / "tokens").length
        times = np.bincount(plan.order, minlength=len(lengths))
        tokens = int((lengths * times).sum())
    found |= {"tokens": tokens, "lost": int(lengths[times == 0].sum()), "doubled": int((times > 1).sum())}
    found |= {"sequences": len(plan), "padding": 1 - tokens / (len(plan) * LENGTH)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
