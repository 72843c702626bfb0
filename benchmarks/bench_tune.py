"""`make bench-tune`: sixteen trials with ASHA beside the full grid of the same sixteen, three seeds.

    python benchmarks/bench_tune.py [--seeds 0 1 2] [--directory DIRECTORY]

The search is `ltt tune` on a Ray cluster with four CPUs declared, four trials at a time. The grid is the same sixteen
points, each trained to its end as `ltt train` does without Ray: what a point comes to is the same, and sixteen groups
of workers need not start. The model is tiny; the points are four learning rates with two warm-ups and two weight
decays. A seed is that of the weights, of the data's order and of the order in which the points are tried. Printed: the
best loss of each, and ASHA's share of the tokens. What was cut short, by Ctrl-C or SIGTERM, resumes with the same
command.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}  # a thread a worker; read at the imports below

from llm_training_toolkit.commands.train import start_run
from llm_training_toolkit.config.search import load_search
from llm_training_toolkit.launch import torchrun  # noqa: F401 - torch and DeepSpeed, once for all points of the grid
from llm_training_toolkit.launch.request import TrainRequest
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.json_lines import read_newest_rows
from llm_training_toolkit.search.results import read_trained_tokens
from llm_training_toolkit.search.space import build_grid

STEPS = 128
BASE = """\
run: {{name: base, dir: {directory}, seed: {seed}}}
model:
  name: qwen3-0.6b
  config_overrides: {{num_hidden_layers: 2, hidden_size: 64, intermediate_size: 128, num_attention_heads: 4, \
num_key_value_heads: 2, head_dim: 16}}
tokenizer: {{train: {{vocab_size: 512}}}}
data:
  sequence_length: 64
  sources: [{{path: {corpus}, format: code}}]
  eval: {{fraction: 0.05}}
train: {{steps: {steps}, global_batch_size: 8, micro_batch_size: 8}}
export: {{at_end: false}}
cluster: {{workers: 1}}
"""
SEARCH = """\
base: base_{seed}.yaml
name: asha_{seed}
search:
  optim.lr: [1e-4, 1e-3, 3e-3, 1e-2]
  optim.warmup: [0.02, 0.1]
  optim.weight_decay: [0.0, 0.1]
searcher: {{name: grid, seed: {seed}}}
"""


def _files(directory: Path, corpus: Path, seed: int) -> Path:
    """Write the run and the search of a seed; the search's path."""
    (directory / f"base_{seed}.yaml").write_text(
        BASE.format(directory=directory, corpus=corpus, seed=seed, steps=STEPS)
    )
    search = directory / f"asha_{seed}.yaml"
    search.write_text(SEARCH.format(seed=seed))
    return search


def _trained(directory: Path, seed: int, number: int, point: Mapping[str, Any]) -> tuple[float, int]:
    """The held-out loss of a point of the grid at its end, and its tokens. A run that is finished stays."""
    name = f"grid_{seed}_{number:02}"
    settings = [f"{key}={value}" for key, value in point.items()]
    with (directory / f"{name}.log").open("a") as log:
        request = TrainRequest(directory / f"base_{seed}.yaml", [*settings, f"run.name={name}", "cluster.workers=0"])
        start_run(request, Console(log))
    metrics = RunDirectory(directory / name).metrics_path
    return [row["eval/loss"] for row in read_newest_rows(metrics) if "eval/loss" in row][-1], read_trained_tokens(
        metrics
    )


def _grid(directory: Path, files: Mapping[int, Path]) -> dict[int, list[tuple[float, int]]]:
    """The loss and the tokens of every point of each seed's grid, two points at a time."""
    points = [
        (directory, seed, number, point)
        for seed, file in files.items()
        for number, point in enumerate(build_grid(load_search(file).search))
    ]
    # Forked, so that what was imported is there; a process each, as DeepSpeed takes one process group in its life.
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        found = pool.starmap(_trained, points, chunksize=1)
    return {seed: [got for got, point in zip(found, points, strict=True) if point[1] == seed] for seed in files}


def _search(file: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What `ltt tune --json` says of the search. Stops it with checkpoints when this process is asked to end."""
    command = [sys.executable, "-m", "llm_training_toolkit", "tune", str(file), "--json"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            said, _ = process.communicate()
        except BaseException:
            process.terminate()
            process.communicate()
            raise
    if process.returncode:
        sys.exit(process.returncode)
    answer: dict[str, Any] = json.loads(said)
    return answer


def main() -> None:
    """Train and search each seed, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--directory", type=Path, default=Path("runs/bench-tune"))
    parser.add_argument("--corpus", type=Path, default=Path(asyncio.__file__).parent)
    asked = parser.parse_args()
    directory = asked.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    files = {seed: _files(directory, asked.corpus, seed) for seed in asked.seeds}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    whole = _grid(directory, files)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own, of a moment ago, would end the cluster first
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    rows = ["seed  grid best  ASHA best  worse by  ASHA's share of tokens"]
    try:
        for seed, file in files.items():
            best, tokens = min(loss for loss, _ in whole[seed]), sum(count for _, count in whole[seed])
            early = _search(file, environment)
            found = early["best"]["value"]
            rows.append(
                f"{seed:4}  {best:9.4f}  {found:9.4f}  {found / best - 1:8.2%}  {early['tokens'] / tokens:22.3f}"
            )
    finally:
        print("\n".join(rows))
        cluster.shutdown()


if __name__ == "__main__":
    main()
