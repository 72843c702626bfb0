"""20 failures of all kinds drawn by chance, then 50 kills while a checkpoint is written: a table and a picture.

python experiments/drill/run.py                             # what `make drill` does: about an hour on two cores
python experiments/drill/run.py --failures 3 --saving 3     # fewer of each
python experiments/drill/run.py --plot-only                 # table and picture again, from result.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
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
    *(f"model.shape.{key}={value}" for key, value in SHAPE.items()),
    "data.sequence_length=128",
    "checkpoint.every=20",
    "checkpoint.keep=3",
    "cluster.gpus_per_worker=0",
]


def drill(arguments: list[str], settings: list[str]) -> dict[str, Any]:
    """One drill on the quickstart, made small."""
    config = str(ROOT / "configs" / "quickstart.yaml")
    command = [sys.executable, "-m", "llm_training_toolkit", "drill", config, *SMALL, *settings, "--json", *arguments]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def table(result: dict[str, Any]) -> str:
    """Both drills as a table, failures by kind."""
    lines = ["| drill | kind | failures | seconds to recover: median, most |", "|---|---|---|---|"]
    for name, found in result["drills"].items():
        for kind in sorted({each["kind"] for each in found["failures"]}):
            seconds = sorted(each["seconds_to_recover"] for each in found["failures"] if each["kind"] == kind)
            middle = seconds[len(seconds) // 2]
            lines.append(f"| {name} | {kind} | {len(seconds)} | {middle:.1f}, {seconds[-1]:.1f} |")
    titles = ("steps", "steps repeated", "missing", "doubled", "largest loss difference", "weights equal", "cold start")
    lines += ["", f"| drill | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, found in result["drills"].items():
        keys = ("steps", "steps_repeated", "sequences_missing", "sequences_doubled", "max_loss_difference")
        values = [f"{found[key]:g}" for key in keys]
        values += ["yes" if found["weights_equal"] else "no", f"{found['cold_start_seconds']:.1f} s"]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any]) -> None:
    """Seconds to recover by step and kind, and where the time went."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drills = result["drills"]
    figure, axes = plt.subplots(len(drills), 2, figsize=(11, 3.4 * len(drills)), squeeze=False, layout="constrained")
    for (name, found), (left, right) in zip(drills.items(), axes, strict=True):
        for kind in sorted({each["kind"] for each in found["failures"]}):
            points = [(each["step"], each["seconds_to_recover"]) for each in found["failures"] if each["kind"] == kind]
            left.scatter(*zip(*points, strict=True), label=kind, s=28)
        left.axhline(found["cold_start_seconds"], color="grey", linestyle="--", label="cold start")
        left.set(title=f"{name}: {len(found['failures'])} failures", xlabel="step", ylabel="seconds to the next step")
        left.set_ylim(bottom=0)
        left.legend(fontsize=8)
        for row, key in enumerate(("goodput", "goodput_undisturbed")):
            start = 0.0
            for number, (part, seconds) in enumerate(found[key].items()):
                right.barh(row, seconds, left=start, color=f"C{number}", label=part if row == 0 else None)
                start += seconds
        right.set(
            yticks=[0, 1], yticklabels=["disturbed", "undisturbed"], xlabel="seconds", title="where the time went"
        )
        right.legend(fontsize=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Run what was asked for and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--failures", type=int, default=20)
    parser.add_argument("--saving", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot-only", action="store_true")
    asked = parser.parse_args()
    if not asked.plot_only:
        ray, alone = ["cluster.workers=2"], ["cluster.workers=0"]
        seed = ["--seed", str(asked.seed)]
        kinds = ["--kills", str(asked.failures), "--kinds", "worker,driver,saving,truncated,hang", *seed]
        saving = ["--kills", str(asked.saving), "--kinds", "saving", *seed]
        drills = {
            "all kinds, 2 workers on Ray": drill(kinds, [*ray, f"train.steps={60 * asked.failures}"]),
            "while saving, 1 process": drill(saving, [*alone, f"train.steps={40 * asked.saving}"]),
        }
        day, cpus = datetime.datetime.now(tz=datetime.UTC).date().isoformat(), os.cpu_count()
        RESULT.write_text(json.dumps({"date": day, "cpus": cpus, "drills": drills}, indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    TABLE.write_text(table(result))
    plot(result)


if __name__ == "__main__":
    main()
