"""Memory and time of a source's index without its text, for numbers of documents such as a million and ten million.

    python benchmarks/data/sizes.py 1000000 10000000

Lengths are made up (`lengths.py`: a mean of 740 tokens, about 3 kB of text), and each stage of a preparation that sees
all documents at once does its work on them in a process of its own:

    held out   choice among the documents, by hash and length
    join       of the shards' indexes into one, on disk
    pack       into sequences of 2,048 tokens, in windows, and write the plan
    open       index and plan, as each rank of a run does
    step       rows of one rank and the loss tokens of a step of 1,024 sequences, in the middle of the epoch

Prints a Markdown table: processor seconds, and the peak of each process beyond its imports in GB. Memory-mapped pages
count, though the kernel can drop them.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from indexing import SHARD_TOKENS, packed, write_shard
from lengths import LENGTH, chunks_of, lengths_of
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.arrow_store import ExampleStore, join_examples
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo, EpochInfo
from llm_training_toolkit.data.prepare.document_index import select_held_out
from llm_training_toolkit.data.prepare.packing import PackingPlan
from single_stream import describe_single_stream

BYTES_PER_TOKEN = 4
GLOBAL_BATCH = 1024
PART = 1_000_000  # documents whose index is in memory at once while shards are written
TITLES = ("held out", "join", "pack", "open", "step")


def choose_held_out(documents: int, _folder: Path) -> float:
    """Choose one in a hundred."""
    sizes = lengths_of(documents)
    hashes = np.random.default_rng(1).integers(0, 1 << 64, documents, dtype=np.uint64)
    return measure_cpu(lambda: select_held_out(hashes, sizes, 0.01))


def write_shards(documents: int, folder: Path) -> float:
    """Write the shards' indexes, a part of the documents at a time; no part of a preparation's own work."""
    for part, begin in enumerate(range(0, documents, PART)):
        count = min(PART, documents - begin)
        document, chunks = chunks_of(lengths_of(count))
        begins = np.cumsum(chunks) - chunks
        bounds = np.flatnonzero(np.diff(begins // SHARD_TOKENS, prepend=-1, append=-1))
        for number, (first, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            place = folder / "shards" / f"{part:04d}-{number:04d}"
            place.parent.mkdir(exist_ok=True)
            write_shard(place, document[first:stop] + begin, chunks[first:stop])
    return 0.0


def join_shards(_documents: int, folder: Path) -> float:
    """Join them, as a preparation does."""
    (folder / "tokens").mkdir()
    parts = sorted((folder / "shards").iterdir())
    return measure_cpu(lambda: join_examples(parts, folder / "tokens", lambda _file, _to: None))


def pack(_documents: int, folder: Path) -> float:
    """Pack the whole index."""
    return measure_cpu(lambda: packed(folder))


def open_index(_documents: int, folder: Path) -> float:
    """Open index and plan."""
    return measure_cpu(lambda: (ExampleStore(folder / "tokens"), PackingPlan.read(folder / "plan")))


def look_up(_documents: int, folder: Path) -> float:
    """Look up a step, the index being open."""
    dataset = PackedDataset(build_dataset_info(folder), global_batch=GLOBAL_BATCH)
    step = dataset.dataset_info.total_sequences // GLOBAL_BATCH // 2
    dataset.count_loss_tokens(0)
    dataset.get_document_spans(0, range(1))
    return measure_cpu(lambda: (dataset.count_loss_tokens(step), dataset.get_document_spans(step, range(8, 16))))


def build_dataset_info(folder: Path) -> DatasetInfo:
    """Describe the index as one stream of one epoch, without anything held out."""
    sequences = len(PackingPlan.read(folder / "plan"))
    return describe_single_stream(folder, EpochInfo("tokens", "plan", sequences, 0, 0), sequence_length=LENGTH)


def measure_cpu(work: Callable[[], object]) -> float:
    """Return processor seconds."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def run_alone(work: Callable[[int, Path], float], documents: int, folder: Path) -> tuple[float, float]:
    """Run a stage in a process of its own; return processor seconds, and GB beyond those at its start."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def report() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = work(documents, folder)
        results.put((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6))

    process = context.Process(target=report)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)
    found: tuple[float, float] = results.get()
    return found


def main() -> None:
    """Measure every size, and print a row for each."""
    heads = ["documents", "text, GB", "sequences", *(f"{title}, s / GB" for title in TITLES[:-1]), "step, ms / GB"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    for documents in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found = [run_alone(choose_held_out, documents, folder)]
            run_alone(write_shards, documents, folder)
            found += [run_alone(work, documents, folder) for work in (join_shards, pack, open_index, look_up)]
            text = int(ExampleStore(folder / "tokens").length.sum()) * BYTES_PER_TOKEN / 1e9
            sequences = len(PackingPlan.read(folder / "plan"))
        cells = [f"{seconds:.1f} / {peak:.2f}" for seconds, peak in found[:-1]]
        cells.append(f"{found[-1][0] * 1e3:.1f} / {found[-1][1]:.2f}")
        print(f"| {documents:,} | {text:,.0f} | {sequences:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
