"""Whether the toolkit works on this machine's GPU, in five minutes: one table, and the same as JSON.

Runs the code beside it, installed or not, with Ray or without; each check in processes of its own, so that one
failure hides no other. Without a GPU it says so and ends well; `--device cpu` rehearses the same checks on a tiny
model. docs/gpu-smoke.md says how to read the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

from smoke.bench import Bench  # noqa: E402 - the path comes first, so that nothing need be installed
from smoke.checks import CHECKS  # noqa: E402
from smoke.order import order_for  # noqa: E402
from smoke.runner import Done, Result, Runner, Task  # noqa: E402

Values = dict[str, Any]
_LOOK_SECONDS = 120.0
_INTERRUPTED = 130
"""What a shell makes of Ctrl-C."""
_OLDEST = (8, 0)
"""Compute capability of the first GPUs with bf16 (Ampere)."""
_STYLES = {"ok": "green", "failed": "bold red", "skipped": "yellow"}
_WIDTH = 150
"""Characters of a line where there is no terminal."""


def main(words: Sequence[str] | None = None) -> int:
    """Look, check, tell; 1 when a check failed."""
    arguments = _arguments(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the tasks are ended, too
    began = time.monotonic()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ltt-gpu-smoke-", ignore_cleanup_errors=True) as work:
        runner = Runner(Path(work), arguments.device, began + 60 * arguments.minutes, forks=arguments.device == "cpu")
        try:
            report = _report(arguments.device, runner)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted: every task is ended\n")
            return _INTERRUPTED
        finally:
            runner.close()
    report["seconds"] = round(time.monotonic() - began, 1)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    _show(report)
    return 1 if report["status"] == "failed" else 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows there, too")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu = a rehearsal on a tiny model")
    parser.add_argument("--minutes", type=float, default=5.0, help="what has no time left is skipped (default: 5)")
    return parser.parse_args(words)


def _report(device: str, runner: Runner) -> Values:
    """The machine, the tasks and the rows."""
    report: Values = {
        "status": "skipped",
        "reason": "",
        "device": device,
        "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "machine": {},
        "rows": [],
        "tasks": {},
    }
    looked = _look(device, runner)
    if not isinstance(looked, Done):
        reason = f"this machine cannot be looked at: {looked.reason}"
        return report | {"status": "failed", "reason": reason, "tasks": {"probe": asdict(looked)}}
    machine = looked.stages[0]
    report["machine"] = machine
    if device == "cuda" and (reason := _unusable(machine)):
        return report | {"reason": reason}
    bench = _bench(device, runner.work, machine)
    results = _run(bench, machine, runner)
    rows = [check.row(results, bench, machine) for check in CHECKS]
    found = {row.result for row in rows}
    status = "failed" if "failed" in found else "ok" if "ok" in found else "skipped"
    reason = "no check was made" if status == "skipped" else ""
    tasks = {name: asdict(result) for name, result in results.items()}
    return report | {"status": status, "reason": reason, "rows": [asdict(row) for row in rows], "tasks": tasks}


def _look(device: str, runner: Runner) -> Result:
    """What machine this is. It has a limit of its own: without it there is nothing to tell."""
    own = Runner(runner.work, device, time.monotonic() + _LOOK_SECONDS)
    return own.run(Task("probe", "task_probe", [{"device": device}], needs=0.0, limit=_LOOK_SECONDS))


def _unusable(machine: Values) -> str:
    """Why there is no GPU to check here; empty where there is one."""
    if machine["gpu"] is None:
        return f"torch finds no GPU here (torch {machine['torch']}, CUDA build {machine['cuda_build'] or 'none'})"
    if tuple(machine["capability"]) < _OLDEST:
        found = ".".join(map(str, machine["capability"]))
        return f"bf16 needs compute capability 8.0 (Ampere) or later, and {machine['gpu']} has {found}"
    return ""


def _bench(device: str, work: Path, machine: Values) -> Bench:
    return Bench(
        device="cuda" if device == "cuda" else "cpu",
        work=work,
        cores=machine["cpus"],
        gpus=machine["gpu_count"],
        free_bytes=1e9 * machine.get("free_gb", 0.0),
        matmul_flops=machine["matmul_flops"],
    )


def _run(bench: Bench, machine: Values, runner: Runner) -> dict[str, Result]:
    """Run every task of this machine, saying so; the results by name."""
    order = order_for(bench, machine["packages"], machine["cannot_compile"])
    results: dict[str, Result] = dict(order.left_out)
    terminal = Console(stderr=True, highlight=False, soft_wrap=True)

    def run(task: Task) -> None:
        results[task.name] = result = runner.run(task)
        said = f"{result.seconds:.0f} s" if isinstance(result, Done) else result.reason
        terminal.print(f"{task.name}: {said}", markup=False, style="dim")

    for task in order.first:
        run(task)
    with ThreadPoolExecutor(bench.together) as pool:
        try:
            list(pool.map(run, order.together))
        except KeyboardInterrupt:
            runner.close()  # otherwise the pool waits for every task
            raise
    for task in order.last:
        run(task)
    return results


def _show(report: Values) -> None:
    """The table on standard output, or the one line that says why there is none; then what failed tasks said."""
    terminal = Console(highlight=False)
    terminal.width = terminal.width if terminal.is_terminal else _WIDTH
    if not report["rows"]:
        terminal.print(f"{report['status']}: {report['reason']}", markup=False, soft_wrap=True)
    else:
        terminal.print(_title(report["machine"], report["device"]), markup=False)
        table = Table("check", "result", "value", "expected")
        for row in report["rows"]:
            result = Text(row["result"], style=_STYLES[row["result"]])
            table.add_row(row["name"], result, Text(row["value"]), Text(row["expected"]))
        terminal.print(table)
        terminal.print(f"{report['status']} in {report['seconds']:.0f} s", markup=False)
    for name, task in report["tasks"].items():
        if task.get("log"):
            terminal.print(f"\n{name}: {task['reason']}\n{task['log']}", markup=False, soft_wrap=True)


def _title(machine: Values, device: str) -> str:
    packages = machine["packages"]
    if device == "cuda":
        what = (
            f"{machine['gpu_count']} x {machine['gpu']}, {machine['free_gb']:.0f} GB free, driver {machine['driver']}"
        )
        what += f", CUDA {machine['cuda_build']}"
    else:
        what = f"rehearsal on {machine['cpus']} CPU cores"
    named = ", ".join(f"{name} {packages[name] or 'absent'}" for name in ("deepspeed", "transformers", "ray"))
    return f"{what}, torch {machine['torch']}, {named}"


if __name__ == "__main__":
    sys.exit(main())
