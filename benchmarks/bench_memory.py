"""Memory of one forward and backward pass: the loss in chunks beside whole logits, at Qwen's vocabulary.

Each in a process of its own, in turns; the figure is the most memory that the whole Python process ever held, its
imports and the model included. `make bench-memory` prints a table for docs/benchmarks.md; `--json FILE` keeps every
measurement. Exits 1 if the chunks take more than 0.4 of what transformers' own loss takes, or give another loss.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

STEP = Path(__file__).resolve().parent / "memory" / "one_step.py"
KINDS = {
    "transformers, whole logits": "transformers",
    "this toolkit, loss_chunk 0 (whole)": "0",
    "this toolkit, loss_chunk auto": "auto",
}
BASE, OURS = "transformers, whole logits", "this toolkit, loss_chunk auto"
AIM = 0.4
Measured = dict[str, list[dict[str, float]]]


def measure(kind: str) -> dict[str, float]:
    """What one process printed."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(STEP), kind], env=environment, capture_output=True, text=True, check=False
    )
    found = [line for line in done.stdout.splitlines() if line.startswith('{"peak"')]
    if not found:
        raise SystemExit(f"{kind} failed:\n{done.stdout}\n{done.stderr}")
    measured: dict[str, float] = json.loads(found[-1])
    return measured


def middle(results: Measured, kind: str, key: str) -> float:
    """The median over the rounds."""
    return statistics.median(found[key] for found in results[kind])


def table(results: Measured) -> str:
    """Medians, and their ratio to the base, as Markdown."""
    rows = ["| loss | most memory, GB | ratio | seconds | loss | norm of the gradient |", "|---" * 6 + "|"]
    for kind in results:
        peak, seconds = middle(results, kind, "peak"), middle(results, kind, "seconds")
        cells = [f"{peak / 1e9:.2f}", f"{peak / middle(results, BASE, 'peak'):.2f}", f"{seconds:.1f}"]
        cells += [f"{results[kind][0]['loss']:.6f}", f"{results[kind][0]['norm']:.4f}"]
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(rows)


def failures(results: Measured) -> list[str]:
    """What the aim is missed by."""
    found = []
    ratio = middle(results, OURS, "peak") / middle(results, BASE, "peak")
    if ratio > AIM:
        found.append(f"the chunks take {ratio:.2f} of the memory of whole logits, the aim is {AIM}")
    for key, tolerance in (("loss", 1e-5), ("norm", 1e-3)):
        ours, base = results[OURS][0][key], results[BASE][0][key]
        if not math.isclose(ours, base, rel_tol=tolerance):
            found.append(f"{key} {ours} is not {base}")
    return found


def main() -> None:
    """Measure, print the table, keep the numbers, say what is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: Measured = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds):
        for kind, word in KINDS.items():
            results[kind].append(measure(word))
            print(f"round {number + 1}, {kind}: {results[kind][-1]['peak'] / 1e9:.2f} GB", flush=True)
    print(f"\n{table(results)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rounds": arguments.rounds, "results": results}, indent=1))
    if missed := failures(results):
        raise SystemExit("; ".join(missed))


if __name__ == "__main__":
    main()
