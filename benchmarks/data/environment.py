"""A preparation of all Python files of this environment, several times over, and the most memory that it took.

    python benchmarks/data/environment.py FOLDER 4

Writes the installed packages' `.py` files below FOLDER, each copy of a file beginning at another of its lines, so
that no two are equal. Then prepares them as `ltt prepare` does, on one core, in sequences of 2,048, with a tokenizer
of 8,192 tokens trained on Python's standard library. Prints JSON: a line for each part of a stage, then the whole, with
processor seconds and the peak beyond the imports. The same command continues an unfinished preparation, and then
counts its own part alone.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import sysconfig
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.prepare.builder import prepare_dataset
from llm_training_toolkit.data.sources import read_source_documents
from llm_training_toolkit.data.tokenizer import TokenizationSpec, train_tokenizer
from llm_training_toolkit.families import find_size

MODEL = "qwen2.5-coder-0.5b"
MARKERS = TokenizationSpec.from_family(find_size(MODEL).family)
STANDARD_LIBRARY = SourceConfig.model_validate({"path": "python:stdlib", "format": "code"})


def read_peak_mib() -> float:
    """Return the peak of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_copies(folder: Path, copies: int) -> None:
    """Write the packages' files, or leave those of an earlier call."""
    packages = Path(sysconfig.get_paths()["purelib"])
    for number in range(copies):
        target = folder / f"copy{number}"
        if target.is_dir():
            continue
        unfinished = folder / f"unfinished{number}"
        for file in packages.rglob("*.py"):
            lines = file.read_bytes().splitlines(keepends=True)
            begin = len(lines) * number // copies
            place = unfinished / file.relative_to(packages)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"".join([*lines[begin:], *lines[:begin]]))
        unfinished.rename(target)


def train_small_tokenizer(folder: Path) -> None:
    """Train the tokenizer unless it exists."""
    if not folder.is_dir():
        unfinished = folder.with_name("unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        texts = (document.text for document in read_source_documents(STANDARD_LIBRARY, 0))
        train_tokenizer(texts, 8192, MARKERS, unfinished)
        unfinished.rename(folder)


def main() -> None:
    """Write, prepare, print."""
    folder, copies = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    write_copies(folder / f"times{copies}", copies)
    train_small_tokenizer(folder / "tokenizer")
    source = {"path": str(folder / f"times{copies}" / "**" / "*.py"), "format": "code"}
    config = Config.model_validate(
        {
            "run": {"name": "environment", "dir": str(folder / "runs")},
            "model": {"name": MODEL},
            "tokenizer": {"path": str(folder / "tokenizer")},
            "data": {"sequence_length": 2048, "sources": [source], "on_error": "skip", "max_skipped": 0.01},
            "train": {"steps": 1},
        }
    )
    before, begun, printed = read_peak_mib(), time.process_time(), set[tuple[str, int]]()

    def measure() -> dict[str, float]:
        return {"cpu_seconds": time.process_time() - begun, "peak_mib": read_peak_mib() - before}

    def print_progress(stage: str, done: int, total: int) -> None:
        tenth = done * 10 // total if total else done // 10_000
        if (stage, tenth) not in printed:
            printed.add((stage, tenth))
            print(json.dumps({"stage": stage, "documents": done, **measure()}), flush=True)

    info = prepare_dataset(config, MARKERS, progress=print_progress).dataset_info.sources[0]
    facts = {
        "copies": copies,
        "gb": sum(file.stat().st_size for file in (folder / f"times{copies}").rglob("*.py")) / 1e9,
        "documents": info.documents,
        "dropped": info.dropped,
        "tokens": info.tokens,
        **measure(),
    }
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
