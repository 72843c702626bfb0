"""Wall time of a training with checkpoints beside the same without: this toolkit, DeepSpeed and HF Trainer.

Sixty steps of a model of 100 million parameters with five checkpoints and without any, each in a process of its own, on
local disk and on storage of 20 MB/s (checkpoint/throttle.c, the same for all). The two of a pair follow each other, and
every second round in the other order. Asked of this toolkit: at most 1.05 times the time on local disk, 1.10 on slow
storage. There the steps are longer, since storage of 20 MB/s needs a minute for a checkpoint: what is written in less
time than that is waited for, by anybody.

`make bench-checkpoint` prints tables for docs/benchmarks.md. What each process measured is kept in `--json`, so that
the same command resumes after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent / "checkpoint"
LOOPS = {"this toolkit": "saving_toolkit.py", "DeepSpeed": "saving_deepspeed.py", "HF Trainer": "saving_hf_trainer.py"}
SLOW = 20_000_000
"""Bytes per second."""


class Pair(NamedTuple):
    """A training with checkpoints and one without, in one round."""

    plain: dict[str, Any]
    saving: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Of their wall times."""
        return float(self.saving["seconds"] / self.plain["seconds"])


def throttle(directory: Path) -> Path:
    """The library that slows writes, compiled. Raises SystemExit where there is no C compiler."""
    library = directory / "throttle.so"
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None or not sys.platform.startswith("linux"):
        raise SystemExit(
            "slow storage is left out: it needs Linux and a C compiler (cc, gcc or clang); --storage local"
        )
    built = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(HERE / "throttle.c"), "-ldl", "-lpthread"]
    subprocess.run(built, check=True)
    return library


def measure(script: str, asked: dict[str, Any], scratch: Path, *, slow: bool) -> dict[str, Any]:
    """What one process measured."""
    directory = scratch / "run"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": str(asked["threads"]), "DS_ACCELERATOR": "cpu"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    if slow:
        limit = {"THROTTLE_DIRECTORY": f"{directory}/", "THROTTLE_BYTES_PER_SECOND": str(SLOW)}
        environment |= {"LD_PRELOAD": str(throttle(scratch)), **limit}
    os.sync()  # what the process before has left to write
    command = [sys.executable, str(HERE / script), json.dumps({**asked, "directory": str(directory)})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if not found:
        raise SystemExit(f"{script} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    shutil.rmtree(directory)
    measured: dict[str, Any] = json.loads(found[-1])
    for seconds in measured["whole_seconds"] if slow else []:
        if measured["size"] / seconds > 1.1 * SLOW:
            raise SystemExit(f"{script} writes {measured['size'] / seconds / 1e6:.0f} MB/s past what slows it")
    return measured


def keep(path: Path, results: dict[str, Any]) -> None:
    """Write what is done, whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(results, indent=1))
    part.replace(path)


def table(results: dict[str, Any], storage: str, rounds: int) -> str:
    """Median and range over the rounds as Markdown; times of single checkpoints over all of them."""
    rows = ["| loop | without, s | with, s | ratio | a step waits, s | whole after, s | GB |", "|---" * 7 + "|"]
    for loop in LOOPS:
        keys = [f"{storage}, {loop}, round {number}" for number in range(1, rounds + 1)]
        pairs = [
            Pair(*(results[f"{key}, {kind}"] for kind in ("without", "with")))
            for key in keys
            if f"{key}, with" in results and f"{key}, without" in results
        ]
        if not pairs:
            continue
        plain, saving = (statistics.median(run["seconds"] for run in runs) for runs in zip(*pairs, strict=True))
        ratios = [pair.ratio for pair in pairs]
        ratio = f"{statistics.median(ratios):.2f}" + (
            f" ({min(ratios):.2f} to {max(ratios):.2f})" if rounds > 1 else ""
        )
        waits, whole = (
            [each for pair in pairs for each in pair.saving[key]] for key in ("wait_seconds", "whole_seconds")
        )
        spread = [f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in (waits, whole)]
        cells = [f"{plain:.0f}", f"{saving:.0f}", ratio, *spread, f"{pairs[0].saving['size'] / 1e9:.2f}"]
        rows.append(f"| {loop} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Measure what is not there yet, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--checkpoints", type=int, default=5, help="at equal distances, none after the last step")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="that train")
    parser.add_argument("--storage", nargs="+", choices=["local", "slow"], default=["local", "slow"])
    parser.add_argument("--loops", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    parser.add_argument("--sequences", type=int, nargs=2, default=[1, 5], help="in a step: local, slow")
    parser.add_argument("--shape", default="100m", help="tiny: to try the benchmark itself")
    parser.add_argument("--json", type=Path, default=Path("runs/bench-checkpoint.json"))
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    asked = {"shape": options.shape, "steps": options.steps, "threads": options.threads}
    kinds = {"without": 0, "with": options.steps // (options.checkpoints + 1)}
    with tempfile.TemporaryDirectory(dir=options.json.parent) as scratch:
        for number in range(1, options.rounds + 1):
            for storage in options.storage:
                sequences = options.sequences[storage == "slow"]
                for loop in options.loops:
                    for kind in sorted(kinds, reverse=number % 2 == 1):
                        key = f"{storage}, {loop}, round {number}, {kind}"
                        if key in results:
                            continue
                        wanted = {**asked, "sequences": sequences, "every": kinds[kind]}
                        slow = storage == "slow" and kind == "with"
                        results[key] = measure(LOOPS[loop], wanted, Path(scratch).absolute(), slow=slow)
                        keep(options.json, results)
                        print(f"{key}: {results[key]['seconds']:.1f} s", flush=True)
    for storage in options.storage:
        print(f"\n{storage}\n{table(results, storage, options.rounds)}")


if __name__ == "__main__":
    main()
