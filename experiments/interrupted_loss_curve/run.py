"""Train the quickstart three times: undisturbed, killed and stopped, and on a changing number of workers. Plot all.

python experiments/interrupted_loss_curve/run.py              # some ten minutes on two cores
python experiments/interrupted_loss_curve/run.py --plot-only  # the picture again, from result.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULT = HERE / "result.json"
PICTURE = ROOT / "docs" / "pictures" / "interrupted_loss_curve.png"
STEPS = 300
LENGTH = [f"train.steps={STEPS}", "checkpoint.interval=40", "eval.interval=100", "cluster.gpus_per_worker=0"]
PACKAGES = ("torch", "deepspeed", "ray", "transformers")


@dataclass(frozen=True)
class Event:
    """Something done to a run at a step it had just completed, and with how many workers it resumed."""

    step: int
    what: str
    workers: int


DISTURBED = [
    Event(55, "worker killed", 2),
    Event(130, "stopped, resumed", 2),
    Event(215, "driver killed, resumed", 2),
]
ELASTIC = [Event(90, "stopped, resumed on 1 worker", 1), Event(190, "stopped, resumed on 2 workers", 2)]


class Run:
    """One run of `ltt train`, started as often as needed."""

    def __init__(self, name: str, directory: Path) -> None:
        self.path = directory / name
        self._arguments = [f"run.name={name}", f"run.dir={directory}", *LENGTH]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, workers: int) -> None:
        """Start or resume in a process group of its own."""
        ltt = [sys.executable, "-m", "llm_training_toolkit", "train", str(ROOT / "configs" / "quickstart.yaml")]
        words = [*ltt, *self._arguments, f"cluster.workers={workers}"]
        self._process = subprocess.Popen(words, start_new_session=True)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running command."""
        assert self._process is not None
        return self._process

    def rows(self) -> list[dict[str, Any]]:
        """The numbers of every step recorded so far; a step that was repeated occurs again."""
        file = self.path / "metrics.jsonl"
        lines = [line for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
        return [row for row in map(json.loads, lines) if "train/loss" in row]

    def wait_for(self, step: int) -> None:
        """Wait until a step is completed."""
        while not any(row["step"] >= step for row in self.rows()[-3:]):
            if self.process.poll() is not None:
                raise SystemExit(f"{self.path}: ended with {self.process.returncode} before step {step}")
            time.sleep(0.1)

    def finish(self, expected: int = 0) -> None:
        """Wait for the end of the command."""
        if (code := self.process.wait()) != expected:
            raise SystemExit(f"{self.path}: exit code {code}, {expected} was expected")

    def end(self) -> None:
        """Leave no process behind, whatever happened."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def suffer(self, event: Event) -> int:
        """Do to the run what the event says; the last step recorded before it."""
        self.wait_for(event.step)
        if event.what.startswith("worker"):
            attempt = json.loads(max((self.path / "attempts").glob("*.json")).read_text())
            os.kill(attempt["pid"], signal.SIGKILL)
            return int(self.rows()[-1]["step"])
        if event.what.startswith("driver"):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        else:
            self.process.send_signal(signal.SIGTERM)
            self.finish(expected=75)
        reached = int(self.rows()[-1]["step"])
        self.start(event.workers)
        return reached


def trained(name: str, directory: Path, events: Sequence[Event]) -> dict[str, Any]:
    """Train a run through its events: the loss of every step, the final evaluation, and when what happened."""
    run = Run(name, directory)
    try:
        run.start(workers=2)
        happened = [asdict(event) | {"step": run.suffer(event)} for event in events]
        run.finish()
    finally:
        run.end()
    rows = run.rows()
    losses = {row["step"]: row["train/loss"] for row in rows}
    evaluations = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["eval/loss"] for row in evaluations if "eval/loss" in row]
    return {
        "events": happened,
        "losses": [losses[step] for step in range(1, STEPS + 1)],
        "steps_repeated": len(rows) - len(losses),
        "held_out": held_out[-1],
    }


def measure(directory: Path) -> dict[str, Any]:
    """All three runs, and what they ran on."""
    from importlib.metadata import version

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, on CPU, Python {platform.python_version()}",
        "versions": {package: version(package) for package in PACKAGES},
        "undisturbed": trained("undisturbed", directory, []),
        "disturbed": trained("disturbed", directory, DISTURBED),
        "elastic": trained("elastic", directory, ELASTIC),
    }


def differences(result: dict[str, Any], name: str) -> list[float]:
    """Of every step's loss from that of the undisturbed run."""
    pairs = zip(result[name]["losses"], result["undisturbed"]["losses"], strict=True)
    return [abs(found - wanted) for found, wanted in pairs]


def plot(result: dict[str, Any]) -> None:
    """Curves above, differences from the undisturbed run below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 5.6), sharex=True, height_ratios=[4, 1], layout="constrained"
    )
    steps = range(1, STEPS + 1)
    above.plot(steps, result["undisturbed"]["losses"], color="#b8c4d6", linewidth=6, label="undisturbed")
    looks = {
        "disturbed": ("#c0392b", "-", "killed, stopped, killed again; 2 workers"),
        "elastic": ("#1f618d", "--", "stopped twice; 2, then 1, then 2 workers"),
    }
    for name, (color, style, label) in looks.items():
        above.plot(steps, result[name]["losses"], color=color, linestyle=style, linewidth=1.3, label=label)
        below.plot(steps, differences(result, name), color=color, linestyle=style, linewidth=1.1)
    _mark(above, result["disturbed"]["events"], "#c0392b", 0.97)
    _mark(above, result["elastic"]["events"], "#1f618d", 0.70)
    above.set_ylabel("training loss (nats per token)")
    above.legend(loc="lower left", frameon=False)
    below.set_ylabel("difference from\nundisturbed")
    below.set_xlabel("optimizer step")
    largest = max(max(differences(result, name)) for name in looks)
    if largest == 0:
        below.set_ylim(-1, 1)
        below.set_yticks([0])
        below.text(STEPS / 2, 0.25, f"exactly 0 at all {STEPS} steps, in both runs", ha="center")
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def _mark(axis: Any, events: Sequence[dict[str, Any]], color: str, height: float) -> None:
    for event in events:
        axis.axvline(event["step"], color=color, linewidth=0.8, linestyle=":")
        axis.text(
            event["step"] + 2, height, event["what"], color=color, fontsize=8.5, va="top",
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip


def report(result: dict[str, Any]) -> None:
    """The figures in words."""
    for name in ("disturbed", "elastic"):
        found = differences(result, name)
        same = sum(difference == 0 for difference in found)
        print(
            f"{name}: {same} of {STEPS} losses are equal bit for bit, largest difference {max(found):.2e}; "
            f"steps repeated {result[name]['steps_repeated']}; final held-out loss {result[name]['held_out']:.6f}, "
            f"undisturbed {result['undisturbed']['held_out']:.6f}"
        )


def main() -> None:
    """Run, write result.json and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "interrupted_loss_curve")
    arguments = parser.parse_args()
    if not arguments.plot_only:
        for name in ("undisturbed", "disturbed", "elastic"):
            shutil.rmtree(arguments.runs / name, ignore_errors=True)
        RESULT.write_text(json.dumps(measure(arguments.runs.absolute()), indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    plot(result)
    report(result)


if __name__ == "__main__":
    main()
