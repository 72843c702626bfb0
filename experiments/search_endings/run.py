"""A search on a real Ray cluster, ended in every way: what is left of it, and does the same command finish it?

    python experiments/search_endings/run.py               # twenty minutes on two cores
    python experiments/search_endings/run.py --table-only  # the table again, from result.json

Each ending comes once a trial has passed its first rung. What is counted afterwards: placement groups, actors but those
that Ray keeps one of for itself, CPUs that are held, worker processes of all trials.
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from llm_training_toolkit.runs.attempts import read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.search.event_log import EventLog, SearchDirectory
from llm_training_toolkit.search.results import find_best_trial

HERE = Path(__file__).parent
RESULT = HERE / "result.json"
CPUS = 4
LIMIT = 400.0
"""Seconds that a search may take."""
GONE_WITHIN = 120.0
"""Seconds that are given to what was killed to be taken back."""
_LEFT = """
import json, ray
ray.init(log_to_driver=False)
of_ray = {"TrainStateActor", "_AutoscalingCoordinatorActor", "PlacementGroupCleaner"}
groups = ray.util.placement_group_table().values()
actors = ray._private.state.actors().values()
print(json.dumps({
    "groups": sum(group["state"] != "REMOVED" for group in groups),
    "actors": sum(actor["State"] == "ALIVE" and actor["ActorClassName"] not in of_ray for actor in actors),
    "CPUs": CPUS - ray.available_resources().get("CPU", 0.0),
}))
""".replace("CPUS", str(CPUS))
Disturb = Callable[["Cluster", subprocess.Popen[str], SearchDirectory], None]


class Cluster:
    """A Ray cluster of one node, started anew where its head was killed."""

    def __init__(self) -> None:
        self._cluster: Any = None

    def environment(self) -> dict[str, str]:
        """What joins it."""
        from ray.cluster_utils import Cluster as OfRay

        if self._cluster is None:
            self._cluster = OfRay(initialize_head=True, head_node_args={"num_cpus": CPUS, "include_dashboard": True})
        return {**os.environ, "RAY_ADDRESS": self._cluster.address}

    def kill_head(self) -> None:
        """SIGKILL to the head's own process, which alone knows of all others."""
        self._cluster.head_node.all_processes["gcs_server"][0].process.kill()

    def end(self) -> None:
        """Whatever is left of it."""
        if self._cluster is not None:
            with suppress(Exception):  # its head may be dead
                self._cluster.shutdown()
            self._cluster = None


def _signals(*numbers: int) -> Disturb:
    def disturb(_cluster: Cluster, process: subprocess.Popen[str], _found: SearchDirectory) -> None:
        for number in numbers:
            process.send_signal(number)
            time.sleep(1.0)

    return disturb


def _fill_disk(_cluster: Cluster, _process: subprocess.Popen[str], found: SearchDirectory) -> None:
    """Every further write to the event log fails as on a full disk."""
    found.event_log_path.rename(found.event_log_path.with_suffix(".kept"))
    found.event_log_path.symlink_to("/dev/full")


def _free_disk(found: SearchDirectory) -> None:
    kept = found.event_log_path.with_suffix(".kept")
    if kept.exists():
        kept.replace(found.event_log_path)


def _kill_head(cluster: Cluster, _process: subprocess.Popen[str], _found: SearchDirectory) -> None:
    cluster.kill_head()


def _kill_trial(_cluster: Cluster, process: subprocess.Popen[str], found: SearchDirectory) -> None:
    """The workers of the newest trial, as often as it is tried again."""
    number = max(EventLog(found.event_log_path).trials)
    seen = 0
    while process.poll() is None and EventLog(found.event_log_path).trials[number].state == "begun":
        for attempt in sorted(found.get_trial_run(number).attempts_dir.glob("*.json")):
            if int(attempt.stem) > seen:
                seen = int(attempt.stem)
                with suppress(ProcessLookupError):
                    os.kill(read_attempt_record(found.get_trial_run(number), seen)["pid"], signal.SIGKILL)
        time.sleep(0.1)


def _nothing(_cluster: Cluster, _process: subprocess.Popen[str], _found: SearchDirectory) -> None:
    """An undisturbed search."""


ENDINGS: dict[str, Disturb] = {
    "undisturbed": _nothing,
    "a trial's worker killed twice": _kill_trial,
    "Ctrl-C": _signals(signal.SIGINT),
    "Ctrl-C twice": _signals(signal.SIGINT, signal.SIGINT),
    "SIGTERM": _signals(signal.SIGTERM),
    "driver killed (SIGKILL)": _signals(signal.SIGKILL),
    "event log's disk full": _fill_disk,
    "Ray's head killed (SIGKILL)": _kill_head,
}


def _command(runs: Path, name: str) -> list[str]:
    file = runs / f"{name}.yaml"
    shutil.copy(HERE / "search.yaml", file)
    base = (HERE / "base.yaml").read_text()
    (runs / "base.yaml").write_text(base.replace("{name: base, seed: 0}", f'{{name: base, dir: "{runs}", seed: 0}}'))
    return [sys.executable, "-m", "llm_training_toolkit", "tune", str(file)]


def _search(command: list[str], cluster: Cluster, disturb: Disturb, found: SearchDirectory) -> dict[str, Any]:
    """Carry it out, disturbed once a trial has passed its first rung; how it ended."""
    began = time.monotonic()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=cluster.environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True) as work:
        try:
            while work.poll() is None and not (
                found.event_log_path.is_file() and EventLog(found.event_log_path).passed_rungs
            ):
                time.sleep(0.1)
            at = time.monotonic()
            disturb(cluster, work, found)
            said, _ = work.communicate(timeout=LIMIT)
        finally:
            work.kill()
    ended = time.monotonic()
    return {
        "exit": work.returncode,
        "seconds": ended - began,
        "to_end": ended - at,
        "last": _last_line(said.replace(str(found.path.parent), "runs")),
    }


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _left(cluster: Cluster, found: SearchDirectory) -> dict[str, Any]:
    """What is left once Ray has had time to take it back, and how long that took."""
    began = time.monotonic()
    while True:
        pids = {
            pid for number in EventLog(found.event_log_path).trials for pid in _processes(found.get_trial_run(number))
        }
        left = {"processes": sum(map(psutil.pid_exists, pids))} | _left_in(cluster)
        seconds = time.monotonic() - began
        if not any(left.values()) or seconds > GONE_WITHIN:
            return {**left, "after": seconds}
        time.sleep(1.0)


def _left_in(cluster: Cluster) -> dict[str, float]:
    asked = [sys.executable, "-c", _LEFT]
    said = subprocess.run(asked, env=cluster.environment(), capture_output=True, text=True, check=True).stdout
    counts: dict[str, float] = json.loads(said.splitlines()[-1])
    return counts


def _processes(run: RunDirectory) -> list[int]:
    return [pid for record in run.attempts_dir.glob("*.json") for pid in json.loads(record.read_text())["processes"]]


def _ended(found: SearchDirectory) -> dict[int, str]:
    """What the trials that have ended have written down."""
    trials = EventLog(found.event_log_path).trials.values()
    return {
        trial.number: found.get_trial_run(trial.number).metrics_path.read_text()
        for trial in trials
        if trial.state != "begun"
    }


def measure(runs: Path) -> dict[str, Any]:
    """Every ending, and the same command after it."""
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    cluster, endings = Cluster(), dict[str, Any]()
    try:
        for index, (words, disturb) in enumerate(ENDINGS.items()):
            found = SearchDirectory(runs / f"search-{index}")
            command = _command(runs, found.path.name)
            first = _search(command, cluster, disturb, found)
            _free_disk(found)
            if disturb is _kill_head:
                cluster.end()
            first["left"] = _left(cluster, found)
            before = _ended(found)
            again = _search(command, cluster, _nothing, found)
            again["left"] = _left(cluster, found)
            again["repeated"] = sum(_ended(found)[number] != rows for number, rows in before.items())
            event_log = EventLog(found.event_log_path)
            winner = find_best_trial(event_log, "min")
            states = [trial.state for trial in event_log.trials.values()]
            value = winner.last_rung.value if winner and winner.last_rung else None
            endings[words] = {
                "first": first,
                "again": again,
                "ended_before": len(before),
                "states": states,
                "best": value,
            }
            print(words, json.dumps(endings[words]), flush=True)
    finally:
        cluster.end()
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": {"cores": psutil.cpu_count(), "processor": platform.processor() or platform.machine()},
        "endings": endings,
    }


def table(result: dict[str, Any]) -> str:
    """A row an ending."""
    head = ["ending", "exit code", "to its end", "left behind", "gone after", "the same command", "repeated", "trials"]
    lines = [" | ".join(["", *head, "best beside undisturbed", ""]).strip(), "|" + "---|" * (len(head) + 1)]
    wanted = result["endings"]["undisturbed"]["best"]
    for words, ending in result["endings"].items():
        first, again = ending["first"], ending["again"]
        lines.append(
            f"| {words} | {first['exit']} | {first['to_end']:.0f} s | {_in_words(first['left'])} | "
            f"{first['left']['after']:.0f} s | {again['exit']}, {_in_words(again['left'])} left | "
            f"{again['repeated']} of {ending['ended_before']} | {_states(ending['states'])} | "
            f"{ending['best'] / wanted - 1:+.2%} |"
        )
    return "\n".join(lines)


def _in_words(left: dict[str, float]) -> str:
    return (
        ", ".join(f"{left[kind]:g} {kind}" for kind in ("groups", "actors", "CPUs", "processes") if left[kind])
        or "nothing"
    )


def _states(states: list[str]) -> str:
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))


def main() -> None:
    """Measure, write result.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--runs", type=Path, default=HERE.parents[1] / "runs" / "search_endings")
    arguments = parser.parse_args()
    if not arguments.table_only:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # before Ray is imported: the cluster is this machine's own
        RESULT.write_text(json.dumps(measure(arguments.runs.absolute()), indent=1) + "\n")
    print(table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
