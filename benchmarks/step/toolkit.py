"""The toolkit's own loop, engine and worker, without Ray: the ranks that torchrun started."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from common import CLIP, FAMILIES, LR, WEIGHT_DECAY, Clock, read_request
from llm_training_toolkit.cli.app import main as ltt
from loop import LENGTH, VOCABULARY


def main() -> None:
    """Train and report."""
    work = read_request()
    directory = Path(tempfile.gettempdir()) / f"ltt-bench-step-{os.environ['TORCHELASTIC_RUN_ID']}-{os.getppid()}"
    directory.mkdir(exist_ok=True)
    config = {
        "run": {"name": "bench", "dir": str(directory)},
        "model": {"name": FAMILIES[work.family][1], "config_overrides": work.shape},
        "tokenizer": {"train": {"vocab_size": VOCABULARY}},
        "data": {
            "sequence_length": LENGTH,
            "sources": [{"path": "python:stdlib", "format": "code"}],
            "eval": {"fraction": 0.0},
            "cache": str(Path(tempfile.gettempdir()) / "ltt-bench-cache"),
        },
        "optim": {"lr": LR, "weight_decay": WEIGHT_DECAY, "max_grad_norm": CLIP},
        "train": {
            "steps": work.steps,
            "global_batch_size": work.global_batch,
            "micro_batch_size": work.rows,
            "precision": work.precision,
        },
        "checkpoint": {"interval": 1_000_000},
        "failures": {"on_loss_spike": "ignore"},
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
    if os.environ["RANK"] != "0":
        return
    rows = [json.loads(line) for line in (directory / "bench" / "metrics.jsonl").read_text().splitlines()]
    # From line to line: the whole loop counts, the writing of metrics too.
    times = [row["time"] for row in rows if "perf/step_seconds" in row]
    Clock(work, [after - before for before, after in pairwise(times)]).report()


if __name__ == "__main__":
    main()
