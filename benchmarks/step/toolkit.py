"""The toolkit's own loop, engine and worker, without Ray: the ranks that torchrun started."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from common import CLIP, GLOBAL_BATCH, LENGTH, LR, MODEL, WEIGHT_DECAY, Clock
from llm_training_toolkit.cli import main as ltt

_SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def main() -> None:
    """Train and report."""
    steps, world_size = int(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    directory = Path(tempfile.gettempdir()) / f"ltt-bench-step-{os.environ['TORCHELASTIC_RUN_ID']}-{os.getppid()}"
    directory.mkdir(exist_ok=True)
    config = {
        "run": {"name": "bench", "dir": str(directory)},
        "model": {"name": "qwen3-0.6b", "shape": {key: MODEL[key] for key in _SHAPE} | {"head_dim": MODEL["head_dim"]}},
        "tokenizer": {"train": {"vocab_size": MODEL["vocab_size"]}},
        "data": {
            "sequence_length": LENGTH,
            "sources": [{"path": "python:stdlib", "format": "code"}],
            "eval": {"fraction": 0.0},
            "cache": str(Path(tempfile.gettempdir()) / "ltt-bench-cache"),
        },
        "optim": {"lr": LR, "weight_decay": WEIGHT_DECAY, "clip": CLIP},
        "train": {"steps": steps, "global_batch": GLOBAL_BATCH, "micro_batch": GLOBAL_BATCH // world_size},
        "checkpoint": {"every": 1_000_000},
        "export": {"at_end": False},
        "cluster": {"workers": 0},
    }
    path = directory / f"bench_{os.environ['RANK']}.yaml"
    path.write_text(json.dumps(config))
    sys.argv = ["ltt", "train", str(path), "--json"]
    terminal = os.dup(1)
    try:
        ltt()
    except SystemExit as end:
        if end.code:
            raise
    os.dup2(terminal, 1)
    rows = [json.loads(line) for line in (directory / "bench" / "metrics.jsonl").read_text().splitlines()]
    # From line to line: the whole loop counts, the writing of metrics too.
    times = [row["time"] for row in rows if "perf/step_seconds" in row]
    Clock(steps, [after - before for before, after in pairwise(times)]).report()


if __name__ == "__main__":
    main()
