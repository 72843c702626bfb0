"""The toolkit's own loop and worker, without Ray, ended as soon as all is measured."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from llm_training_toolkit.cli.app import main as ltt
from loop import CLIP, LENGTH, LR, SHAPES, VOCABULARY, WEIGHT_DECAY, Measured, SaveRequest, size_of


def configuration(asked: SaveRequest) -> dict[str, Any]:
    """Of a run that is longer than what is measured: its last step would save and wait for it."""
    return {
        "run": {"name": "run", "dir": asked.directory},
        "model": {"name": "qwen3-0.6b", "config_overrides": SHAPES[asked.shape]},
        "tokenizer": {"train": {"vocab_size": VOCABULARY}},
        "data": {
            "sequence_length": LENGTH,
            "sources": [{"path": "python:stdlib", "format": "code"}],
            "eval": {"fraction": 0.0},
            "cache": str(Path(tempfile.gettempdir()) / "ltt-bench-cache"),
        },
        "optim": {"lr": LR, "weight_decay": WEIGHT_DECAY, "max_grad_norm": CLIP},
        "train": {"steps": 100 * asked.steps, "global_batch_size": asked.sequences, "micro_batch_size": 1},
        "checkpoint": {"interval": asked.every or 1_000_000, "keep_latest": 100},
        "failures": {"on_loss_spike": "ignore"},
        "export": {"at_end": False},
        "cluster": {"workers": 0, "cpus_per_worker": asked.threads},
    }


def recorded(run: Path, key: str) -> dict[int, dict[str, Any]]:
    """The lines of the run's metrics so far that have a key, by step."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = (json.loads(line) for line in lines if line.endswith("}"))
    return {row["step"]: row for row in found if key in row}


def measure(asked: SaveRequest) -> Measured:
    """Wait for the last step and the last checkpoint that are to be measured."""
    run = Path(asked.directory) / "run"
    saves = [asked.every * number for number in range(1, asked.saves + 1)]
    places = [run / "checkpoints" / f"step_{step:09d}_a1" for step in saves]
    while asked.steps not in (steps := recorded(run, "perf/step_seconds")) or not all(map(_is_whole, places)):
        time.sleep(0.2)
    done = {step: row["time"] for step, row in steps.items() if step <= asked.steps}
    waits = {step: row["perf/checkpoint_seconds"] for step, row in recorded(run, "perf/checkpoint_seconds").items()}
    whole = [(place / "manifest.json").stat().st_mtime for place in places]
    began = done[1] - steps[1]["perf/step_seconds"]
    return Measured(
        seconds=max(*done.values(), *whole) - began,
        step_seconds=[
            done[1] - began,
            *(done[n] - done[n - 1] - waits.get(n - 1, 0.0) for n in range(2, len(done) + 1)),
        ],
        wait_seconds=[waits[step] for step in saves],
        whole_seconds=[end - done[step] for step, end in zip(saves, whole, strict=True)],
        size=size_of(str(places[0])) if places else 0,
    )


def _is_whole(checkpoint: Path) -> bool:
    return (checkpoint / "manifest.json").exists()


def main() -> None:
    """Train in this process and end it as soon as all is measured."""
    asked = SaveRequest(**json.loads(sys.argv[1]))
    path = Path(asked.directory) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(configuration(asked)))
    terminal = os.dup(1)  # the run redirects what is printed

    def watch() -> None:
        measured = measure(asked)
        os.dup2(terminal, 1)
        measured.report()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    sys.argv = ["ltt", "train", str(path), "--json"]
    ltt()


if __name__ == "__main__":
    main()
