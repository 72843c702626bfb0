"""Runs whose number of ranks changes beside undisturbed ones of three seeds: how far apart do they end?

    python experiments/elastic_spread/run.py               # eight minutes on two cores; what is done is kept
    python experiments/elastic_spread/run.py --table-only  # the table again, from result.json

A run is killed (SIGKILL to all its ranks) as soon as a checkpoint of a certain step is whole, and resumes with others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from llm_training_toolkit.data.sample_log import read_sample_log
from llm_training_toolkit.runs.directory import RunDirectory

HERE = Path(__file__).parent
RESULT = HERE / "result.json"
STEPS = 150
LIMIT = 180.0
"""Seconds that a run may take to come to its next checkpoint."""


class Stretch(NamedTuple):
    """So many ranks, killed when the checkpoint of a step is whole; the last ones work to the end."""

    ranks: int
    until: int = STEPS


class Plan(NamedTuple):
    """A run of the experiment."""

    seed: int
    zero: int
    stretches: tuple[Stretch, ...]


UNDISTURBED = {f"undisturbed, seed {seed}": Plan(seed, 2, (Stretch(2),)) for seed in (1, 2, 3)}
BACK, FEWER = (Stretch(2, 50), Stretch(1, 100), Stretch(2)), (Stretch(3, 75), Stretch(2))
ELASTIC = {f"2, 1, 2 ranks, ZeRO {zero}": Plan(1, zero, BACK) for zero in (1, 2, 3)}
ELASTIC |= {f"3, 2 ranks, ZeRO {zero}": Plan(1, zero, FEWER) for zero in (1, 2, 3)}


def start(plan: Plan, ranks: int, directory: Path, name: str) -> subprocess.Popen[bytes]:
    """The command, with torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", str(ranks)]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    words = [f"run.name={name}", f"run.dir={directory}", f"run.seed={plan.seed}", f"engine.zero_stage={plan.zero}"]
    ltt = [sys.executable, "-m", "llm_training_toolkit", "train", str(HERE / "config.yaml"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*torchrun, *ltt], env=environment, stdout=subprocess.DEVNULL)


def kill(torchrun: subprocess.Popen[bytes]) -> None:
    """SIGKILL to all at once: torchrun puts every rank in a session of its own, so none dies with it."""
    processes = [psutil.Process(torchrun.pid), *psutil.Process(torchrun.pid).children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    torchrun.wait()
    psutil.wait_procs(processes[1:], timeout=LIMIT)


def wait_for(run: RunDirectory, step: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the checkpoint of a step is whole."""
    end = time.monotonic() + LIMIT
    while not any(run.checkpoints_dir.glob(f"step_{step:09d}_*/manifest.json")):
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"{run.path}: no checkpoint of step {step} (exit code {process.poll()})")
        time.sleep(0.02)


def trained(name: str, plan: Plan, directory: Path) -> dict[str, Any]:
    """Train through all stretches: the loss and the sequences of every step, and the final held-out loss."""
    run = RunDirectory(directory / name.replace(",", "").replace(" ", "-"))
    shutil.rmtree(run.path, ignore_errors=True)
    for stretch in plan.stretches:
        process = start(plan, stretch.ranks, directory, run.path.name)
        try:
            if stretch.until < STEPS:
                wait_for(run, stretch.until, process)
            elif process.wait():
                raise SystemExit(f"{run.path}: exit code {process.returncode}")
        finally:
            if process.poll() is None:
                kill(process)
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines() if line.endswith("}")]
    steps = {row["step"]: row for row in rows if "train/loss" in row}
    fetched: dict[int, list[Any]] = {step: [] for step in steps}
    for attempt in range(1, 1 + len(plan.stretches)):
        for step, sequences in read_sample_log(run.sample_log_dir, attempt):
            if step in steps and steps[step]["attempt"] == attempt:
                fetched[step] += sequences
    return {
        "seed": plan.seed,
        "losses": [steps[step]["train/loss"] for step in range(1, STEPS + 1)],
        "sequences": [sorted(fetched[step]) for step in range(1, STEPS + 1)],
        "steps_repeated": sum("train/loss" in row for row in rows) - STEPS,
        "held_out": [row["eval/loss"] for row in rows if "eval/loss" in row][-1],
    }


def compared(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """A run beside the undisturbed one of its seed; the sequences themselves need not be kept."""
    pairs = list(zip(found["losses"], wanted["losses"], strict=True))
    same = sum(mine == other for mine, other in zip(found["sequences"], wanted["sequences"], strict=True))
    return {
        "held_out": found["held_out"],
        "steps_repeated": found["steps_repeated"],
        "steps_with_the_same_sequences": same,
        "largest_difference_of_a_loss": max(abs(mine / other - 1) for mine, other in pairs),
        "losses": found["losses"],
    }


def table(result: dict[str, Any]) -> str:
    """What came out, as Markdown."""
    base = result["runs"]["undisturbed, seed 1"]["held_out"]
    heads = [
        "run",
        "held-out loss",
        "beside seed 1",
        "same sequences",
        "largest difference of a loss",
        "steps repeated",
    ]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, run in result["runs"].items():
        cells = [f"{run['held_out']:.5f}", f"{run['held_out'] - base:+.5f}"]
        if name in ELASTIC:
            difference = f"{run['largest_difference_of_a_loss']:.1e}"
            cells += [f"{run['steps_with_the_same_sequences']} of {STEPS}", difference, str(run["steps_repeated"])]
        else:
            cells += [""] * 3
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def verdict(runs: dict[str, Any]) -> str:
    """Whether every run ends within the spread of the seeds."""
    seeds = [runs[name]["held_out"] for name in UNDISTURBED]
    apart = max(abs(runs[name]["held_out"] - seeds[0]) for name in ELASTIC)
    spread = max(seeds) - min(seeds)
    within = "within" if apart <= spread else "NOT within"
    return f"at most {apart:.5f} from the undisturbed run, {within} the spread of three seeds, {spread:.5f}"


def measure(names: Sequence[str], directory: Path) -> dict[str, Any]:
    """Train what is not in `directory` yet."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        file = directory / f"{name}.json"
        if not file.exists():
            began = time.monotonic()
            file.write_text(json.dumps(trained(name, (UNDISTURBED | ELASTIC)[name], directory)))
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    found = {name: json.loads((directory / f"{name}.json").read_text()) for name in names}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, on CPU, Python {platform.python_version()}",
        "runs": {name: compared(run, found["undisturbed, seed 1"]) for name, run in found.items()},
    }


def main() -> None:
    """Train, write result.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--runs", type=Path, default=HERE.parents[1] / "runs" / "elastic_spread")
    arguments = parser.parse_args()
    if not arguments.table_only:
        RESULT.write_text(json.dumps(measure([*UNDISTURBED, *ELASTIC], arguments.runs.absolute()), indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    print(f"{table(result)}\n\n{verdict(result['runs'])}")


if __name__ == "__main__":
    main()
