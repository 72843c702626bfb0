"""Tokens per second of one optimizer step: this toolkit's loop beside four others, in one run.

The loops take turns, so that a machine that slows down slows all of them. `make bench-step` prints a
table for docs/benchmarks.md; `--json FILE` keeps every measurement.
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
from pathlib import Path

HERE = Path(__file__).resolve().parent / "step"
LOOPS = {
    "bare torch": ["bare_torch.py"],
    "bare DeepSpeed": ["bare_deepspeed.py"],
    "bare DeepSpeed, fp32 gradients": ["bare_deepspeed.py", "fp32"],
    "this toolkit": ["toolkit.py"],
    "HF Trainer": ["hf_trainer.py"],
}


def measure(script: str, *options: str, world_size: int, steps: int) -> float:
    """Tokens per second of one loop in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(HERE / script), str(steps), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"tokens_per_second"')]
    if not found:
        raise SystemExit(f"{script} with {world_size} processes failed:\n{done.stdout}\n{done.stderr}")
    return float(json.loads(found[-1])["tokens_per_second"])


def table(results: dict[str, dict[int, list[float]]], worlds: list[int]) -> str:
    """The medians and their ratios to bare DeepSpeed as Markdown."""
    heads = [f"{world} process{'es' if world > 1 else ''} | ratio" for world in worlds]
    rows = [f"| loop | {' | '.join(heads)} |", "|---" * (1 + 2 * len(worlds)) + "|"]
    for loop, found in results.items():
        cells = []
        for world in worlds:
            median, base = (statistics.median(results[name][world]) for name in (loop, "bare DeepSpeed"))
            cells.append(f"{median:,.0f} | {median / base:.2f}")
        rows.append(f"| {loop} | {' | '.join(cells)} |")
        assert found.keys() == set(worlds)
    return "\n".join(rows)


def main() -> None:
    """Measure, print the table, keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, dict[int, list[float]]] = {loop: {world: [] for world in arguments.worlds} for loop in LOOPS}
    for number in range(arguments.rounds):
        for world in arguments.worlds:
            for loop, words in LOOPS.items():
                speed = measure(*words, world_size=world, steps=arguments.steps)
                results[loop][world].append(speed)
                print(f"round {number + 1}, {world} process(es), {loop}: {speed:,.0f} tokens/s", flush=True)
    print()
    print(table(results, arguments.worlds))
    facts = {"date": str(datetime.datetime.now(tz=datetime.UTC).date()), "machine": platform.platform()}
    facts |= {"cpus": str(os.cpu_count()), "steps": str(arguments.steps), "rounds": str(arguments.rounds)}
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "tokens_per_second": results}, indent=1))


if __name__ == "__main__":
    main()
