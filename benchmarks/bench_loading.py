"""Memory of a rank while it loads weights: ZeRO 2, where every rank holds them all, and ZeRO 3, where it holds a part.

Writes a model of random weights in several files, and loads it with two ranks, each stage in processes of its own.
`make bench-loading` prints a table for docs/benchmarks.md; `--json FILE` keeps every measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RANK = Path(__file__).resolve().parent / "loading" / "rank.py"
RANKS = 2
STAGES = (2, 3)


def write_model(directory: Path, layers: int, shard: str) -> None:
    """A Qwen3 of 13 million parameters a layer and 33 million in its embedding, in bf16, in files of `shard` each."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=shard)


def measure(directory: Path, stage: int) -> dict[str, Any]:
    """What rank 0 of RANKS printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(RANK), str(directory), str(stage)]
    # Every freed buffer goes back to the system at once, so that what is measured is what is held.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"bytes"')]
    if not found:
        raise SystemExit(f"ZeRO {stage} failed:\n{done.stdout}\n{done.stderr}")
    measured: dict[str, Any] = json.loads(found[-1])
    return measured


def table(results: dict[int, dict[str, Any]]) -> str:
    """Memory of each rank in shares of the weights, as Markdown."""
    rows = ["| ZeRO | rank | most of its own | most of mapped files | its own afterwards |", "|---" * 5 + "|"]
    for stage, found in results.items():
        for rank, sizes in enumerate(found["ranks"]):
            shares = [sizes[key] / found["bytes"] for key in ("own most", "mapped most", "own after")]
            rows.append(f"| {stage} | {rank} | {' | '.join(f'{share:.2f}' for share in shares)} |")
    return "\n".join(rows)


def main() -> None:
    """Write the model, load it at both stages, print the table, keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shard", default="50MB")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), arguments.layers, arguments.shard)
        results = {stage: measure(Path(folder), stage) for stage in STAGES}
    print(f"weights: {results[3]['bytes'] / 1e6:,.0f} MB; memory in shares of it\n\n{table(results)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"layers": arguments.layers, "ranks": RANKS, "stages": results}, indent=1))


if __name__ == "__main__":
    main()
