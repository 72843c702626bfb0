"""The data layer beside what others use, in one run: rendering, packing, and the first batch after a resume.

Those that are compared take turns, so that a machine that slows down slows all of them. How many documents can be
indexed and packed, in how much memory, is measured of the toolkit alone. `make bench-data` prints tables for
docs/benchmarks.md; `--json FILE` keeps every measurement. TRL's packing is measured where it is installed
(requirements-bench.txt); elsewhere its rows are left out, with a word.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "data"
STRATEGIES = ("bfd", "bfd_split", "wrapped")
TOOLKIT = "this toolkit"
PARTS = ("rendering", "packing", "resuming", "indexing")
PACKAGES = ("tokenizers", "accelerate", "transformers", "numpy", "trl", "datasets")
Found = dict[str, Any]


def run(script: str, *options: object) -> Found:
    """What a script measured, in a process of its own, so that its peak of memory is its own too."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, str(HERE / script), *map(str, options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} {options} failed:\n{done.stdout}\n{done.stderr}")
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], form: str) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def rendering(rounds: int) -> tuple[Found, str]:
    """Tokens per second from documents to tokens on disk, and the ratio to the encoder of each round."""
    found = run("rendering.py", rounds)
    raw, *_ = found["seconds"].values()
    rows = []
    for name, seconds in found["seconds"].items():
        ratios = [before / after for before, after in zip(raw, seconds, strict=True)]
        speed = found["tokens"] / statistics.median(seconds)
        rows.append([name, f"{speed:,.0f}", spread(ratios, ".2f")])
    return found, markdown(["", "tokens a second", "ratio"], rows)


def packing(rounds: int, documents: int) -> tuple[Found, str]:
    """Seconds and what became of the documents; with TRL where it is."""
    others = STRATEGIES if importlib.util.find_spec("trl") else ()
    if not others:
        print("TRL is not installed here, and left out: python -m pip install --requirement requirements-bench.txt")
    found: dict[str, list[Found]] = {}
    for _ in range(rounds):
        found.setdefault(TOOLKIT, []).append(run("packing.py", documents))
        for strategy in others:
            found.setdefault(f'TRL, "{strategy}"', []).append(run("packing_trl.py", documents, strategy))
    heads = [
        "",
        "seconds",
        "tokens kept",
        "documents truncated",
        "cut",
        "cut though they fit",
        "sequences",
        "padding",
        "peak, GB",
    ]
    return found, markdown(heads, [_packing_row(name, each) for name, each in found.items()])


def _packing_row(name: str, measured: Sequence[Found]) -> list[str]:
    first = measured[0]
    return [
        name,
        spread([each["seconds"] for each in measured], ".2f"),
        f"{first['kept']:.1%}",
        f"{first['truncated']:,}",
        f"{first['cut']:,}",
        f"{first['cut_though_short']:,}",
        f"{first['sequences']:,}",
        f"{first['padding']:.2%}",
        f"{max(each['peak_gb'] for each in measured):.2f}",
    ]


def indexing(large: Sequence[int]) -> tuple[Found, str]:
    """Seconds and memory of the toolkit's survey, index and packing of many documents."""
    found = {f"{count:,}": run("indexing.py", count) for count in large}
    heads = [
        "documents",
        "tokens",
        "surveyed, s",
        "indexed, s",
        "packed, s",
        "sequences",
        "padding",
        "lost",
        "peak, GB",
    ]
    rows = [
        [
            name,
            f"{each['tokens']:,}",
            *(f"{each[part]:.1f}" for part in ("survey", "index", "pack")),
            f"{each['sequences']:,}",
            f"{each['padding']:.2%}",
            f"{each['lost']:,}",
            f"{each['peak_gb']:.2f}",
        ]
        for name, each in found.items()
    ]
    return found, markdown(heads, rows)


def resuming(rounds: int, places: Sequence[int]) -> tuple[Found, str]:
    """Milliseconds to the first batch, by where it lies."""
    found = run("resuming.py", rounds, *places)
    by_name: Mapping[str, Mapping[str, list[float]]] = found["seconds"]
    rows = [
        [name, *(spread([each * 1000 for each in seconds], ",.1f") for seconds in by_place.values())]
        for name, by_place in by_name.items()
    ]
    return found, markdown(["milliseconds, resumed at sequence", *(f"{place:,}" for place in places)], rows)


def versions() -> dict[str, str]:
    """Those of the packages, as far as they are there."""
    return {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}


def main() -> None:
    """Measure, print the tables, keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=50_000, help="of the packing beside TRL's")
    parser.add_argument("--large", type=int, nargs="+", default=[1_000_000, 10_000_000], help="of the indexing")
    parser.add_argument("--places", type=int, nargs="+", default=[10, 10_000, 1_000_000], help="sequences to resume at")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to measure")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured: Found = {"date": str(datetime.datetime.now(tz=datetime.UTC).date()), "machine": platform.platform()}
    measured |= {"cpus": os.cpu_count(), "rounds": arguments.rounds, "versions": versions()}
    parts: dict[str, Callable[[], tuple[Found, str]]] = {
        "rendering": lambda: rendering(arguments.rounds),
        "packing": lambda: packing(arguments.rounds, arguments.documents),
        "resuming": lambda: resuming(arguments.rounds, arguments.places),
        "indexing": lambda: indexing(arguments.large),
    }
    for name in PARTS:
        if name in arguments.only:
            measured[name], table = parts[name]()
            print(f"\n{name}\n\n{table}", flush=True)
    print("\n" + ", ".join(f"{name} {version}" for name, version in measured["versions"].items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
