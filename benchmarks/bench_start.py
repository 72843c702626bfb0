"""Seconds from the command to the first optimizer step, beside an empty TorchTrainer with the same imports, in one run.

The two take turns, so that a machine that slows down slows both. `make bench-start` prints a table for
docs/benchmarks.md; `--json FILE` keeps every measurement.

What is timed of the toolkit is `ltt train configs/quickstart.yaml` in a fresh run directory, with its tokens in
the cache already, until `metrics.jsonl` records step 1: so the first step is in it. Nothing is held out, because
the evaluation before step 1 is work that the quickstart asks for, not waiting (`--eval-fraction 0.01` puts it
back). The empty run ends when its workers have imported everything and agreed once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "configs" / "quickstart.yaml"
LTT = [sys.executable, "-m", "llm_training_toolkit"]
EMPTY, TOOLKIT = "empty TorchTrainer", "ltt train"
Results = dict[str, dict[int, list[float]]]


def run(command: Sequence[str | Path], directory: Path) -> float:
    """The time at which a command was started; it has ended well."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    started = time.time()
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout}\n{done.stderr}")
    return started


def overrides(directory: Path, cache: Path, eval_fraction: float) -> list[str]:
    """What is changed in the quickstart: where it lies, and that one step is enough."""
    return [
        f"run.dir={directory}",
        f"data.cache={cache}",
        f"data.eval.fraction={eval_fraction}",
        "train.steps=1",
        "export.at_end=false",
        "cluster.gpus_per_worker=0",
    ]


def empty_seconds(workers: int) -> float:
    """Seconds from the command until the empty run's workers have agreed."""
    with tempfile.TemporaryDirectory() as name:
        reached = Path(name) / "reached"
        started = run([sys.executable, HERE / "start" / "empty_trainer.py", str(workers), reached], Path(name))
        return float(reached.read_text()) - started


def toolkit_seconds(workers: int, cache: Path, eval_fraction: float) -> tuple[float, float]:
    """Seconds from the command until step 1 is recorded, and those of the step itself."""
    with tempfile.TemporaryDirectory() as name:
        words = [*overrides(Path(name), cache, eval_fraction), f"cluster.workers={workers}"]
        started = run([*LTT, "train", CONFIG, *words], Path(name))
        rows = [json.loads(line) for line in (Path(name) / "quickstart" / "metrics.jsonl").read_text().splitlines()]
        [first] = [row for row in rows if "perf/step_seconds" in row]
        return first["time"] - started, first["perf/step_seconds"]


def table(results: Results) -> str:
    """Medians, spreads and the ratio of the medians as Markdown."""
    rows = [
        f"| workers | {EMPTY}, seconds | {TOOLKIT}, seconds | ratio | of that the first step |",
        "|---|---|---|---|---|",
    ]
    for workers, empty in results[EMPTY].items():
        toolkit, step = results[TOOLKIT][workers], statistics.median(results["first step"][workers])
        ratio = statistics.median(toolkit) / statistics.median(empty)
        rows.append(f"| {workers} | {_spread(empty)} | {_spread(toolkit)} | {ratio:.2f} | {step:.2f} |")
    return "\n".join(rows)


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


def main() -> None:
    """Measure, print the table, keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--eval-fraction", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = (EMPTY, TOOLKIT, "first step")
    results: Results = {name: {workers: [] for workers in arguments.workers} for name in names}
    cache = Path(tempfile.gettempdir()) / "ltt-bench-cache"
    run([*LTT, "prepare", CONFIG, *overrides(cache, cache, arguments.eval_fraction)], HERE)
    empty_seconds(1)  # files come from the disk only once: both find them in memory
    for number in range(arguments.rounds):
        for workers in arguments.workers:
            empty = empty_seconds(workers)
            toolkit, step = toolkit_seconds(workers, cache, arguments.eval_fraction)
            for name, seconds in zip(names, (empty, toolkit, step), strict=True):
                results[name][workers].append(seconds)
            print(f"round {number + 1}, {workers} worker(s): {empty:.1f} s empty, {toolkit:.1f} s toolkit", flush=True)
    print()
    print(table(results))
    facts = {"date": str(datetime.datetime.now(tz=datetime.UTC).date()), "machine": platform.platform()}
    facts |= {"cpus": str(os.cpu_count()), "rounds": str(arguments.rounds), "eval_fraction": arguments.eval_fraction}
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "seconds": results}, indent=1))


if __name__ == "__main__":
    main()
