"""Trains every variant of an experiment with every seed, and writes result.json, a table and a picture.

    python run.py               # what is done is kept; the same command resumes
    python run.py --table-only  # table and picture again, from result.json

`experiment.yaml` beside this file names the question's variants, each with the fields that it changes in `config.yaml`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from ruamel.yaml import YAML

import llm_training_toolkit as ltt

HERE = Path(__file__).parent
RESULT, PICTURE = HERE / "result.json", HERE / "curves.png"
SETTINGS: Mapping[str, Any] = YAML(typ="safe").load(HERE / "experiment.yaml")


def train(variant: str, seed: int, runs: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train one variant with one seed, or resume it: its losses by step, its speed."""
    changes = [f"{key}={json.dumps(value)}" for key, value in SETTINGS["variants"][variant].items()]
    place = [f"run.name={variant}-{seed}", f"run.dir={runs}", f"run.seed={seed}"]
    result = ltt.train(HERE / "config.yaml", [*changes, *place, *overrides], progress=lambda _: None)
    metrics = ltt.open_run(result.run).metrics().to_pylist()
    validation = [[row["step"], row["eval/loss"]] for row in metrics if row.get("eval/loss") is not None]
    check_result(variant, seed, result, validation)
    speeds = [row["perf/tokens_per_second"] for row in metrics if row.get("perf/tokens_per_second") is not None]
    return {
        "training": [[row["step"], row["train/loss"]] for row in metrics if row.get("train/loss") is not None],
        "validation": validation,
        "tokens_per_second": statistics.median(speeds),
    }


def check_result(variant: str, seed: int, result: ltt.TrainResult, validation: Sequence[Sequence[float]]) -> None:
    """Raise SystemExit for a run that is not a result: it was stopped, or has no validation loss."""
    state = f"{variant}, seed {seed}: {result.status} at step {result.step}"
    if result.status != "finished":
        raise SystemExit(f"{state}: run the command again")
    if not validation:
        raise SystemExit(
            f"{state} without a validation loss: set data.eval and run the command again with other --runs"
        )


def measure(runs: Path, seeds: Sequence[int], overrides: Sequence[str]) -> dict[str, Any]:
    """Train every variant with every seed."""
    found: dict[str, Any] = {variant: {} for variant in SETTINGS["variants"]}
    for seed in seeds:
        for variant, by_seed in found.items():
            by_seed[str(seed)] = train(variant, seed, runs, overrides)
            print(f"{variant}, seed {seed}: done", flush=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "overrides": list(overrides),
        "variants": found,
    }


def format_table(result: Mapping[str, Any]) -> str:
    """Final validation loss of each variant with its spread over the seeds, as Markdown."""
    rows = ["| variant | validation loss | spread | tokens/s |", "|---|---|---|---|"]
    for variant, seeds in result["variants"].items():
        losses = [run["validation"][-1][1] for run in seeds.values()]
        speed = statistics.median(run["tokens_per_second"] for run in seeds.values())
        spread = f"{max(losses) - min(losses):.4f} of {len(losses)} seeds"
        rows.append(f"| {variant} | {statistics.mean(losses):.4f} | {spread} | {speed:,.0f} |")
    return "\n".join(rows)


def plot(result: Mapping[str, Any], picture: Path) -> None:
    """Draw the losses: one colour for each variant, one line for each seed."""
    mpl.use("Agg")
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axes, kind in zip(panels, ("training", "validation"), strict=True):
        for number, (variant, seeds) in enumerate(result["variants"].items()):
            for order, run in enumerate(seeds.values()):
                steps, losses = zip(*run[kind], strict=True)
                axes.plot(steps, losses, color=f"C{number}", label=None if order else variant, linewidth=1.2)
        axes.set(title=f"{kind} loss", xlabel="step")
        axes.spines[["right", "top"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Train, write result.json, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="fields of every run, as key=value")
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="directory of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SETTINGS["seeds"])
    parser.add_argument("--table-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table_only:
        result = measure(arguments.runs.absolute(), arguments.seeds, arguments.overrides)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    plot(result, PICTURE)
    print(format_table(result))


if __name__ == "__main__":
    main()
