"""Seconds until training can begin, of those that the whole first epoch takes.

`python benchmarks/data/first_partition.py 2 8`: Python's standard library twice over in one file, in 8 partitions.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from llm_training_toolkit.config import Config, parse_config
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.prepare.builder import DatasetBuilder
from llm_training_toolkit.data.prepare.epochs import get_tokenization_spec
from llm_training_toolkit.data.prepare.shards import render_in_process
from llm_training_toolkit.data.sources import read_source_documents
from llm_training_toolkit.data.tokenizer import TokenizationSpec, train_tokenizer

VOCABULARY = 8192
LENGTH = 2048


def write_records(path: Path, copies: int) -> int:
    """Write the files of the standard library as records, each copy with a first line of its own; return characters."""
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for document in read_source_documents(SourceConfig(path="python:stdlib", format="code"), 0):
                text = f"# copy {copy}\n{document.text}"
                total += len(text)
                file.write(json.dumps({"content": text}) + "\n")
    return total


def build_config(folder: Path, partitions: int) -> Config:
    """Return the configuration of a run over the records."""
    return parse_config(
        {
            "run": {"name": "first-partition", "dir": str(folder)},
            "model": {"name": "qwen3-0.6b"},
            "tokenizer": {"path": str(folder / "tokenizer")},
            "data": {
                "sequence_length": LENGTH,
                "sources": [{"path": str(folder / "records.jsonl"), "format": "code"}],
                "partitions": partitions,
            },
            "train": {"steps": 1},
        },
        "benchmark",
    )


class StageClock:
    """Seconds on the wall and of the processors for each stage of a preparation."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self._stage, self._since = "", self._read()

    def enter_stage(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Note that work on a stage goes on."""
        del done, total
        if stage == self._stage:
            return
        now = self._read()
        wall, cpu = self.seconds.get(self._stage, (0.0, 0.0))
        self.seconds[self._stage] = (wall + now[0] - self._since[0], cpu + now[1] - self._since[1])
        self._stage, self._since = stage, now

    @staticmethod
    def _read() -> tuple[float, float]:
        return time.monotonic(), time.process_time()


def measure(folder: Path, spec: TokenizationSpec, partitions: int) -> dict[str, tuple[float, float]]:
    """Prepare the first epoch part by part; return (wall, processor) seconds."""
    clock = StageClock()
    builder = DatasetBuilder(build_config(folder, partitions), spec, clock.enter_stage, render_in_process)
    begun = time.monotonic(), time.process_time()
    builder.build_parts([1])
    first = time.monotonic() - begun[0], time.process_time() - begun[1]
    builder.build_parts([partitions])
    whole = time.monotonic() - begun[0], time.process_time() - begun[1]
    clock.enter_stage("")
    return {"document index": clock.seconds["reading"], "first part": first, "whole epoch": whole}


def main() -> None:
    """Measure with the copies and partitions of the command line."""
    copies, partitions = int(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        characters = write_records(folder / "records.jsonl", copies)
        (folder / "tokenizer").mkdir()
        spec = get_tokenization_spec(build_config(folder, partitions))
        library = read_source_documents(SourceConfig(path="python:stdlib", format="code"), 0)
        train_tokenizer([document.text for document in library], VOCABULARY, spec, folder / "tokenizer")
        print(json.dumps({"characters": characters, "partitions": partitions}), flush=True)
        for stage, (wall, cpu) in measure(folder, spec, partitions).items():
            print(json.dumps({"until": stage, "seconds": round(wall, 1), "processor_seconds": round(cpu, 1)}))


if __name__ == "__main__":
    main()
