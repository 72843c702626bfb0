"""Tokens per second of one optimizer step: this toolkit's loop beside three others, at two sizes of three families.

The loops take turns, so that a machine that slows down slows all of them. `make bench-step` prints a
table for docs/benchmarks.md; `--json FILE` keeps every measurement.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LOOPS = {
    "bare torch": "bare_torch.py",
    "bare DeepSpeed": "bare_deepspeed.py",
    "HF Trainer": "hf_trainer.py",
    "this toolkit": "toolkit.py",
}
TOOLKIT = "this toolkit"
FAMILIES = ("qwen3", "starcoder2", "starcoder1")
STEPS = {"4.2M": 40, "99.5M": 15}
AIM = 0.97


@dataclass(frozen=True)
class Case:
    """What is measured of every loop."""

    family: str
    size: str
    world_size: int

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.family}, {self.size}, {self.world_size} process{'es' if self.world_size > 1 else ''}"


Results = dict[Case, dict[str, list[float]]]


def measure(script: str, case: Case, asked: dict[str, Any]) -> float:
    """Tokens per second of one loop in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(case.world_size)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [str(HERE / "step" / script), json.dumps({**asked, "family": case.family, "size": case.size})]
    if case.world_size == 1 and shutil.which("taskset"):
        # A process that may move between cores shares its caches with whatever it meets there.
        command = ["taskset", "--cpu-list", str(max(os.sched_getaffinity(0))), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(HERE / "checkpoint")  # for the shapes
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"tokens_per_second"')]
    if not found:
        raise SystemExit(f"{script}, {case.name}, failed:\n{done.stdout}\n{done.stderr}")
    return float(json.loads(found[-1])["tokens_per_second"])


def faster_precision() -> str:
    """The precision that `train.precision: auto` takes on this CPU."""
    import torch

    from llm_training_toolkit.distributed.matmul_speed import measure_bf16_slowdown
    from llm_training_toolkit.plan import choose_precision

    return str(choose_precision([measure_bf16_slowdown(torch.device("cpu"))], "cpu").value)


def table(results: Results) -> str:
    """The medians, and the toolkit's ratio to the best of the others, as Markdown."""
    heads = [*LOOPS, "ratio to the best of the others"]
    rows = [f"| tokens/s | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for case, found in results.items():
        medians = {loop: statistics.median(speeds) for loop, speeds in found.items()}
        cells = [f"{medians[loop]:,.0f}" for loop in LOOPS]
        rows.append(f"| {case.name} | {' | '.join(cells)} | {ratio(found):.2f} |")
    return "\n".join(rows)


def ratio(found: dict[str, list[float]]) -> float:
    """The toolkit's median beside the best median of the others."""
    return statistics.median(found[TOOLKIT]) / max(
        statistics.median(speeds) for loop, speeds in found.items() if loop != TOOLKIT
    )


def rounds(arguments: argparse.Namespace, cases: list[Case]) -> Iterator[tuple[Case, str, float]]:
    """Measure every loop of every case once a round."""
    asked = {"precision": arguments.precision, "micro_batches": arguments.micro_batches}
    for number in range(arguments.rounds):
        for case in cases:
            asked["steps"] = arguments.steps or STEPS[case.size]
            for loop, script in LOOPS.items():
                speed = measure(script, case, asked)
                print(f"round {number + 1}, {case.name}, {loop}: {speed:,.0f} tokens/s", flush=True)
                yield case, loop, speed


def main() -> None:
    """Measure, print the table, keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES[:1])
    parser.add_argument("--sizes", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: the faster one on this machine")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--micro-batches", type=int, default=1, help="of each process in a step")
    parser.add_argument("--steps", type=int, help="8 at least; default: 40 of the small model, 15 of the large one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.precision = arguments.precision or faster_precision()
    cases = [
        Case(family, size, world)
        for family in arguments.families
        for size in arguments.sizes
        for world in arguments.worlds
    ]
    results: Results = {case: {loop: [] for loop in LOOPS} for case in cases}
    for case, loop, speed in rounds(arguments, cases):
        results[case][loop].append(speed)
    print(f"\n{arguments.precision}, {arguments.micro_batches} micro-batch(es) a process, aim {AIM}:\n")
    print(table(results))
    facts = {"date": str(datetime.datetime.now(tz=datetime.UTC).date()), "machine": platform.platform()}
    facts |= {"cpus": str(os.cpu_count()), "rounds": str(arguments.rounds), "precision": arguments.precision}
    facts |= {"micro_batches": str(arguments.micro_batches)}
    if arguments.json:
        found = [{**asdict(case), "tokens_per_second": loops} for case, loops in results.items()]
        arguments.json.write_text(json.dumps({**facts, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
