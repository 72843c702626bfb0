"""Train a small model with fill-in-the-middle and without, three seeds each; measure both on what is held out; plot.

python experiments/fim/run.py              # about twenty-five minutes on two cores
python experiments/fim/run.py --plot-only  # the picture again, from result.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = HERE / "config.yaml"
RESULT = HERE / "result.json"
PICTURE = ROOT / "docs" / "pictures" / "fim.png"
SEEDS = (1, 2, 3)
GAPS = 8
"""Gaps in each held-out document, drawn from as many seeds."""
PACKAGES = ("torch", "transformers", "tokenizers")
FIM = {"with": "{rate: 0.5}", "without": "null"}
"""The field `fim` of the source, by kind of run."""


@dataclass(frozen=True)
class View:
    """A kind of model, and what it is shown of a document with a gap."""

    run: str
    given: Literal["both", "prefix"]
    label: str
    color: str


VIEWS = {
    "with, both sides": View("with", "both", "with FIM,\nprefix and suffix", "#1f618d"),
    "with, prefix alone": View("with", "prefix", "with FIM,\nprefix alone", "#7fb3d5"),
    "without, prefix alone": View("without", "prefix", "without FIM,\nprefix alone", "#c0392b"),
}


def train(directory: Path, kind: str, seed: int) -> Path:
    """Train, or resume; a run that is finished is left alone. Its directory."""
    name = f"{kind}_{seed}"
    fields = [f"run.dir={directory}", f"run.name={name}", f"run.seed={seed}", f"data.sources.0.fim={FIM[kind]}"]
    subprocess.run([sys.executable, "-m", "llm_training_toolkit", "train", str(CONFIG), *fields], check=True)
    return directory / name


def measure(run: Path, kind: str) -> dict[str, Any]:
    """The loss of all held-out tokens, and of middles by what the model is shown of their documents.

    Kept in the run, so that it is measured once.
    """
    kept = run / "measured.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    from llm_training_toolkit.evaluation.model import EvalModel
    from llm_training_toolkit.evaluation.run_tasks import run_task as carry_out
    from llm_training_toolkit.evaluation.task import InfillTask, PerplexityTask

    subject = EvalModel(run, device="cpu")
    found: dict[str, Any] = {"next token": dict(carry_out(PerplexityTask(batch=16), subject, _silent).figures)}
    for name, view in VIEWS.items():
        if view.run == kind:
            tasks = [InfillTask(given=view.given, seed=seed, batch=32, tokens=48) for seed in range(GAPS)]
            found[name] = _mean([carry_out(task, subject, _silent).figures for task in tasks])
    print(run.name, json.dumps(found), flush=True)
    kept.write_text(json.dumps(found))
    return found


def _mean(figures: list[Mapping[str, float]]) -> dict[str, float]:
    """Of gaps in the same documents, so that each seed of gaps weighs the same."""
    names = ("bits_per_byte", "exact_match", "edit_similarity", "ended")
    return {name: fmean(each[name] for each in figures) for name in names} | {
        "gaps": sum(each["documents"] for each in figures)
    }


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Progress is not shown."""


def measured(directory: Path) -> dict[str, Any]:
    """All runs, and what they ran on."""
    from importlib.metadata import version

    runs = {f"{kind}_{seed}": measure(train(directory, kind, seed), kind) for seed in SEEDS for kind in FIM}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, on CPU, Python {platform.python_version()}",
        "versions": {package: version(package) for package in PACKAGES},
        "runs": runs,
    }


def values(result: Mapping[str, Any], kind: str, task: str, figure: str) -> list[float]:
    """A figure of a task, by seed."""
    return [result["runs"][f"{kind}_{seed}"][task][figure] for seed in SEEDS]


def plot(result: Mapping[str, Any]) -> None:
    """Middles to the left, all tokens to the right: a dot a seed, a line at the mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9), width_ratios=[3, 2], layout="constrained")
    for place, (name, view) in enumerate(VIEWS.items()):
        _dots(left, place, values(result, view.run, name, "bits_per_byte"), view.color)
    left.set_xticks(range(len(VIEWS)), [view.label for view in VIEWS.values()])
    left.set_ylabel("bits per byte")
    left.set_title("Held-out middles: a line and its end", fontsize=10.5)
    for place, (kind, color) in enumerate({"with": "#1f618d", "without": "#c0392b"}.items()):
        _dots(right, place, values(result, kind, "next token", "loss"), color)
    right.set_xticks(range(2), ["with FIM", "without FIM"])
    right.set_ylabel("nats per token")
    right.set_title("All held-out tokens, left to right", fontsize=10.5)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.25, y=0.25)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def _dots(axis: Any, place: int, found: list[float], color: str) -> None:
    mean = fmean(found)
    axis.plot([place - 0.22, place + 0.22], [mean, mean], color=color, linewidth=2)
    axis.scatter([place + 0.09 * (number - 1) for number in range(len(found))], found, color=color, s=28, zorder=3)
    axis.annotate(f"{mean:.3f} ± {stdev(found):.3f}", (place, max(found)), (0, 8), textcoords="offset points",
                  ha="center", fontsize=9)  # fmt: skip


def report(result: Mapping[str, Any]) -> None:
    """The figures as a table: mean and standard deviation over the seeds."""
    for name, view in VIEWS.items():
        words = [f"{figure} {_spread(values(result, view.run, name, figure))}" for figure in
                 ("bits_per_byte", "exact_match", "edit_similarity", "ended")]  # fmt: skip
        print(f"{name:<22} {', '.join(words)}")
    for kind in FIM:
        words = [
            f"{figure} {_spread(values(result, kind, 'next token', figure))}" for figure in ("loss", "bits_per_byte")
        ]
        print(f"{kind + ', next token':<22} {', '.join(words)}")


def _spread(found: list[float]) -> str:
    return f"{fmean(found):.4f} ± {stdev(found):.4f}"


def main() -> None:
    """Run, write result.json and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "fim")
    arguments = parser.parse_args()
    if not arguments.plot_only:
        RESULT.write_text(json.dumps(measured(arguments.runs.absolute()), indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    plot(result)
    report(result)


if __name__ == "__main__":
    main()
