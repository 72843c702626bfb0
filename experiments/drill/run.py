"""20 failures of all kinds drawn by chance, then 50 kills while a checkpoint is written: a table and a picture.

python experiments/drill/run.py                             # what `make drill` does: about an hour on two cores
python experiments/drill/run.py --failures 3 --saving 3     # fewer of each
python experiments/drill/run.py --plot-only                 # table and picture again, from result.json

A drill that result.json has is not done again; delete the file to begin anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULT, TABLE = HERE / "result.json", HERE / "table.md"
PICTURE = ROOT / "docs" / "pictures" / "drill.png"
SHAPE = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
SMALL = [
    *(f"model.config_overrides.{key}={value}" for key, value in SHAPE.items()),
    "data.sequence_length=128",
    "checkpoint.keep_latest=3",
    "cluster.gpus_per_worker=0",
    "failures.on_loss_spike=ignore",  # steps of a thousand tokens vary as much as spikes do
]
KINDS = "worker,driver,stop,during_checkpoint,corrupt_checkpoint,storage,hang,node,preemption,head"
ON_RAY, ALONE = "every kind, two workers on Ray", "kills while saving, one process"


def results() -> dict[str, dict[str, Any]]:
    """What has been done, by drill."""
    done: dict[str, dict[str, Any]] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    return {name: done[name] for name in (ON_RAY, ALONE) if name in done}


def drill(kills: int, kinds: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """One drill on the quickstart, made small."""
    config = str(ROOT / "configs" / "quickstart.yaml")
    command = [sys.executable, "-m", "llm_training_toolkit", "drill", config, *SMALL, *settings, "--json"]
    command += ["--kills", str(kills), "--faults", kinds, "--seed", str(seed)]
    found = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(found)  # also where something was lost: that is to be seen in the table
    return result | {"run": Path(result["run"]).parent.name}


def table(drills: dict[str, dict[str, Any]]) -> str:
    """All drills: failures by kind, then what was counted."""
    lines = [
        "| drill | kind | failures | seconds to the next step: median, most | of these its workers' start |",
        "|---|---|---|---|---|",
    ]
    for name, found in drills.items():
        for kind in sorted({each["kind"] for each in found["failures"]}):
            mine = [each for each in found["failures"] if each["kind"] == kind]
            seconds = [each["seconds_to_recover"] for each in mine]
            group = statistics.median(each["group_seconds"] for each in mine)
            row = f"{len(mine)} | {statistics.median(seconds):.1f}, {max(seconds):.1f} | {group:.1f}"
            lines.append(f"| {name} | {kind} | {row} |")
    lines += ["", f"| | {' | '.join(drills)} |", "|---" * (len(drills) + 1) + "|"]
    for title in (rows := [counted(found) for found in drills.values()])[0]:
        lines.append(f"| {title} | {' | '.join(row[title] for row in rows)} |")
    return "\n".join(lines) + "\n"


def counted(found: dict[str, Any]) -> dict[str, str]:
    """What a drill counted, by title."""
    killed = [
        each["seconds_to_recover"] for each in found["failures"] if each["kind"] in {"worker", "during_checkpoint"}
    ]
    shares = [f"{sum(found[f'goodput{of}'].values()) / found[f'wall_seconds{of}']:.2%}" for of in ("", "_undisturbed")]
    split = found["goodput"]
    return {
        "failures": str(len(found["failures"])),
        "steps": str(found["steps"]),
        "steps done again": str(found["steps_repeated"]),
        "sequences missing": str(found["sequences_missing"]),
        "sequences doubled": str(found["sequences_doubled"]),
        "largest difference of a step's loss": f"{found['max_loss_difference']:g}",
        "final weights and moments bit for bit": "yes" if found["weights_equal"] else "no",
        "a checkpoint was half written": str(sum(each["half_written"] for each in found["failures"])),
        "resumed from a wrong checkpoint": str(found["checkpoints_wrong"]),
        "cold start, and its workers alone": (
            f"{found['cold_start_seconds']:.1f} s, {found['cold_group_seconds']:.1f} s"
        ),
        "killed rank to next step / cold start: median, most": ratio(killed, found["cold_start_seconds"]),
        "killed rank to next step / cold start of the workers alone: median, most": (
            ratio(killed, found["cold_group_seconds"])
        ),
        "wall time": f"{found['wall_seconds']:.1f} s",
        "sum of the parts / wall time, and undisturbed": ", ".join(shares),
        "parts": ", ".join(f"{part} {seconds:.1f}" for part, seconds in split.items()),
    }


def ratio(seconds: list[float], to: float) -> str:
    """Median and most, as parts of a time."""
    return f"{statistics.median(seconds) / to:.2f}, {max(seconds) / to:.2f}"


def plot(drills: dict[str, dict[str, Any]]) -> None:
    """Seconds to recover by step and kind, and where the time went."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(drills), 2, figsize=(13, 4.2 * len(drills)), squeeze=False, layout="constrained")
    for (name, found), (left, right) in zip(drills.items(), axes, strict=True):
        for number, kind in enumerate(sorted({each["kind"] for each in found["failures"]})):
            points = [(each["step"], each["seconds_to_recover"]) for each in found["failures"] if each["kind"] == kind]
            marker = "osD^vP*X<>"[number % 10]
            left.scatter(*zip(*points, strict=True), label=kind, s=30, marker=marker)
        left.axhline(found["cold_start_seconds"], color="grey", linestyle="--", label="cold start")
        if name == ON_RAY:  # a lone process has no workers: its whole command comes again
            twice = 2 * found["cold_group_seconds"]
            left.axhline(twice, color="grey", linestyle=":", label="twice the workers' cold start")
        left.set(title=f"{len(found['failures'])} failures: {name}", xlabel="step", ylabel="seconds to the next step")
        left.set_ylim(bottom=0)
        left.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        for row, key in enumerate(("goodput", "goodput_undisturbed")):
            start = 0.0
            for number, (part, seconds) in enumerate(found[key].items()):
                right.barh(row, seconds, left=start, color=f"C{number}", label=part if row == 0 else None)
                start += seconds
        names = ["disturbed", "undisturbed"]
        right.set(yticks=[0, 1], yticklabels=names, xlabel="seconds", title="where the time went")
        right.legend(fontsize=8, loc="upper right")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Run what was asked for and is not there yet, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--failures", type=int, default=20)
    parser.add_argument("--saving", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot-only", action="store_true")
    asked = parser.parse_args()
    orders = {
        ON_RAY: (asked.failures, KINDS, ["cluster.workers=2", "checkpoint.interval=10"], 40),
        ALONE: (asked.saving, "during_checkpoint", ["cluster.workers=0", "checkpoint.interval=10"], 40),
    }
    for name, (kills, kinds, settings, each) in orders.items():
        if kills and not asked.plot_only and name not in results():
            found = drill(kills, kinds, asked.seed, [*settings, f"train.steps={each * kills}"])
            day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
            done = results() | {name: found | {"date": day, "cpus": os.cpu_count()}}
            RESULT.write_text(json.dumps(done, indent=1) + "\n")
    TABLE.write_text(table(results()))
    plot(results())


if __name__ == "__main__":
    main()
