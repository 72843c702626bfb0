"""Control plane of a run with up to 4,096 ranks, without the ranks: bytes and seconds of each part that grows.

    manifest     layout of 963 parameters at ZeRO 3, written and read; the fragments that rank 0 receives for it
    order        lookup of one rank's rows and of a step's loss tokens, two sequences a rank in the global batch, from
                 one source and from a mixture of three
    attempt      record of an attempt with the place of every rank, written and read
    heartbeats   the driver's actor, its own work for the heartbeats of one second, without Ray's calls

`make bench-scale` prints a table for docs/benchmarks.md; `--json FILE` keeps every measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from llm_training_toolkit.checkpoint import FileEntry, Manifest, read_manifest
from llm_training_toolkit.checkpoint.layout import FragmentIndex, build_layout, find_incomplete_parameters
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo, EpochInfo, StreamInfo
from llm_training_toolkit.data.prepare.packing import PackingPlan
from llm_training_toolkit.distributed.heartbeat import HeartbeatSnapshot
from llm_training_toolkit.launch.ray.control_actor import OTHER_RANKS_HEARTBEAT_SECONDS, _ControlActor
from llm_training_toolkit.runs.attempts import begin_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.worker.devices import RankPlacement

RANKS = (64, 512, 4096)
SHAPES = {f"model.layers.{i // 12}.self_attn.projection_{i % 12}.weight": (8192, 1000 + i) for i in range(963)}
SEQUENCES = 1_000_000
SHARES = (700_000, 300_000, 48_576)  # of a mixture
DRAINS_PER_SECOND = 5

Figures = dict[str, float]


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The fastest of some runs."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def measure_manifest(ranks: int, folder: Path) -> Figures:
    """A checkpoint's manifest, from the fragments that rank 0 receives to what every rank reads."""
    sizes = np.array([math.prod(SHAPES[name]) for name in sorted(SHAPES)])
    piece = -(-sizes // ranks)
    numbers = np.arange(len(sizes), dtype=np.int32)
    indexes = [FragmentIndex(numbers, rank * piece, np.minimum(piece, sizes - rank * piece)) for rank in range(ranks)]
    received = sum(len(pickle.dumps(index)) for index in indexes)
    files = tuple(FileEntry(f"fragments_{rank:05d}.safetensors", 10**9, "a" * 64) for rank in range(ranks))

    def write() -> None:
        layout = build_layout(indexes, SHAPES)
        assert not find_incomplete_parameters(layout, SHAPES)
        manifest = Manifest(1, 1, 1, 1, None, ranks, 3, 1, "c", "d", {}, SHAPES, files, layout)
        (folder / "manifest.json").write_text(manifest.to_json())

    return {
        "manifest_write_seconds": seconds(write),
        "manifest_read_seconds": seconds(lambda: read_manifest(folder)),
        "manifest_bytes": (folder / "manifest.json").stat().st_size,
        "received_bytes": received,
    }


def prepare_order(folder: Path) -> DatasetInfo:
    """An index of a million sequences of one document each."""
    for name in ("plan", "tokens", "tokenizer"):
        (folder / name).mkdir()
    targets = np.random.default_rng(0).integers(1, 4096, SEQUENCES)
    PackingPlan(np.arange(SEQUENCES), np.arange(SEQUENCES + 1), targets).write(folder / "plan")
    stream = StreamInfo(1, (EpochInfo("tokens", "plan", SEQUENCES, 0, 0),))
    return DatasetInfo(
        fingerprint="",
        directory=str(folder),
        tokenizer_path=str(folder / "tokenizer"),
        vocab_size=1,
        pad_id=0,
        sequence_length=4096,
        seed=0,
        sources=(),
        streams=(stream,),
        held_out="tokens",
        held_out_plan="plan",
        eval_sequences=0,
        padding=0.0,
        tokens_lost=0,
    )


def measure_order(ranks: int, dataset_info: DatasetInfo) -> Figures:
    """A step's lookup on one rank."""
    mixture = replace(dataset_info, streams=tuple(replace(dataset_info.streams[0], share=share) for share in SHARES))
    found = {}
    for name, info in {"order_seconds": dataset_info, "mixture_order_seconds": mixture}.items():
        dataset = PackedDataset(info, global_batch=2 * ranks)
        dataset.count_loss_tokens(0)  # opens the index

        def look_up(dataset: PackedDataset = dataset) -> None:
            dataset.get_sequences_at(7, range(ranks, ranks + 2))
            dataset.count_loss_tokens(7)

        found[name] = seconds(look_up, repeats=20)
    return found


def measure_attempt(ranks: int, folder: Path) -> Figures:
    """An attempt's record."""
    run = RunDirectory(folder / f"run{ranks}")
    unit = "GPU-00000000-0000-0000-0000-000000000000"
    places = [
        RankPlacement(f"node-{rank // 8}", f"machine-{rank // 8}", rank % 8, f"cuda:{rank % 8}", "H100", unit, 16)
        for rank in range(ranks)
    ]
    record = {"processes": list(range(ranks)), "ranks": [place.to_json() for place in places]}
    written = seconds(lambda: begin_attempt(run, record), repeats=1)
    return {
        "attempt_write_seconds": written,
        "attempt_read_seconds": seconds(lambda: read_attempt_record(run, 1)),
        "attempt_bytes": (run.attempts_dir / "0001.json").stat().st_size,
    }


def measure_heartbeats(ranks: int) -> Figures:
    """The actor's own work for the heartbeats and answers of one second."""
    actor, beat = _ControlActor(), HeartbeatSnapshot(7, "step 3, micro-batch 1 of 4", 1.0, done=False)
    calls = round(ranks / OTHER_RANKS_HEARTBEAT_SECONDS)
    for rank in range(ranks):
        actor.receive_heartbeat(rank, beat)

    def work() -> None:
        for rank in range(calls):
            actor.receive_heartbeat(rank, beat)
        for _ in range(DRAINS_PER_SECOND):
            pickle.dumps(actor.drain_events())

    return {"heartbeat_calls": calls, "heartbeat_seconds": seconds(work)}


def table(results: dict[int, Figures]) -> str:
    """The figures by number of ranks, as Markdown."""
    rows = {
        "manifest, MB": ("manifest_bytes", 1e-6),
        "manifest written, s": ("manifest_write_seconds", 1),
        "manifest read, s": ("manifest_read_seconds", 1),
        "fragments that rank 0 receives, MB": ("received_bytes", 1e-6),
        "lookup of a step on a rank, ms": ("order_seconds", 1e3),
        "the same, from a mixture of three sources, ms": ("mixture_order_seconds", 1e3),
        "attempt's record, MB": ("attempt_bytes", 1e-6),
        "attempt's record read, ms": ("attempt_read_seconds", 1e3),
        "heartbeats, calls a second": ("heartbeat_calls", 1),
        "heartbeats, the actor's ms a second": ("heartbeat_seconds", 1e3),
    }
    lines = [f"| ranks | {' | '.join(f'{ranks:,}' for ranks in results)} |", "|---" * (len(results) + 1) + "|"]
    for title, (key, factor) in rows.items():
        lines.append(f"| {title} | {' | '.join(f'{found[key] * factor:,.3g}' for found in results.values())} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every part for each number of ranks, print the table, keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset_info = prepare_order(folder)
        results = {
            ranks: measure_manifest(ranks, folder)
            | measure_order(ranks, dataset_info)
            | measure_attempt(ranks, folder)
            | measure_heartbeats(ranks)
            for ranks in RANKS
        }
    print(table(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
