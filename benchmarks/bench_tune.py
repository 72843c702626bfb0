"""`make bench-tune`: sixteen trials with ASHA beside the full grid of the same sixteen, three seeds.

    python benchmarks/bench_tune.py [--seeds 0 1 2] [--directory DIRECTORY]

Both searches are `ltt tune` on a Ray cluster with four CPUs declared; the model is tiny, the sixteen points are four
learning rates with two warm-ups and two weight decays. Printed: the best loss of each, and ASHA's share of the tokens.
A search that was cut short goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS = 64
BASE = """\
run: {{name: base, dir: {directory}, seed: {seed}}}
model:
  name: qwen3-0.6b
  shape: {{num_hidden_layers: 2, hidden_size: 64, intermediate_size: 128, num_attention_heads: 4, \
num_key_value_heads: 2, head_dim: 16}}
tokenizer: {{train: {{vocab_size: 512}}}}
data:
  sequence_length: 64
  sources: [{{path: {corpus}, format: code}}]
  eval: {{fraction: 0.1}}
train: {{steps: {steps}, global_batch: 8, micro_batch: 4}}
export: {{at_end: false}}
cluster: {{workers: 2}}
"""
SEARCH = """\
base: base_{seed}.yaml
name: {name}_{seed}
search:
  optim.lr: [1e-4, 1e-3, 3e-3, 1e-2]
  optim.warmup: [0.02, 0.1]
  optim.weight_decay: [0.0, 0.1]
searcher: {{name: grid, seed: {seed}}}
scheduler: {{name: {scheduler}, factor: 4}}
"""


def _search(directory: Path, name: str, seed: int, environment: dict[str, str]) -> dict[str, Any]:
    """What `ltt tune --json` says of one search."""
    scheduler = "none" if name == "grid" else "asha"
    file = directory / f"{name}_{seed}.yaml"
    file.write_text(SEARCH.format(name=name, seed=seed, scheduler=scheduler))
    command = [sys.executable, "-m", "llm_training_toolkit", "tune", str(file), "--json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def main() -> None:
    """Search each seed both ways and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--directory", type=Path, default=Path("runs/bench-tune"))
    parser.add_argument("--corpus", type=Path, default=Path(json.__file__).parent)
    asked = parser.parse_args()
    directory = asked.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    print("seed  grid best  ASHA best  worse by  ASHA's share of tokens")
    try:
        for seed in asked.seeds:
            base = BASE.format(directory=directory, corpus=asked.corpus, seed=seed, steps=STEPS)
            (directory / f"base_{seed}.yaml").write_text(base)
            whole, early = (_search(directory, name, seed, environment) for name in ("grid", "asha"))
            losses = whole["best"]["value"], early["best"]["value"]
            share = early["tokens"] / whole["tokens"]
            print(f"{seed:4}  {losses[0]:9.4f}  {losses[1]:9.4f}  {losses[1] / losses[0] - 1:8.2%}  {share:22.3f}")
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
