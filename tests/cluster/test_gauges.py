"""Gauges of a run, scraped from the exporter of a node as Prometheus does, and the dashboard that draws them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import fork_server
from launching import Environment, command, run_of, wait_for_step
from llm_training_toolkit.launch.ray.train_fn import get_gauge_name
from llm_training_toolkit.runs.directory import RunDirectory

DASHBOARD = Path(__file__).parents[2] / "cluster" / "monitoring" / "grafana_dashboard.json"
EXPORTERS = """
import json, ray
ray.init(log_to_driver=False, logging_level="error")
print(json.dumps([f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]))
"""
SAMPLE = re.compile(r'^(ray_ltt_\w+)\{[^}]*run="gauged"[^}]*\} (\S+)$', re.MULTILINE)


def test_prometheus_scrapes_the_newest_step(launch_config: Callable[..., Path], ray_environment: Environment) -> None:
    sections = {"train": {"steps": 100_000, "global_batch_size": 4, "micro_batch_size": 4}, "eval": {"interval": 10}}
    config = launch_config("gauged", **sections, cluster={"workers": 1}, monitoring={"prometheus": True})
    asked = fork_server.run([sys.executable, "-c", EXPORTERS], env=ray_environment, capture_output=True, check=True)
    with fork_server.popen(command(config), env=ray_environment, stdout=subprocess.PIPE) as process:
        try:
            wait_for_step(run_of(config), 20, process)
            found = scrape(json.loads(asked.stdout))
        finally:
            process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 75, out
    losses = read_metrics(run_of(config), "train/loss")
    step = int(found["ray_ltt_step"])  # set before the loss, which may still be that of the step before
    assert found["ray_ltt_train_loss"] in {losses[step], losses[step - 1]}
    written = {f"ray_{get_gauge_name(name)}" for name in read_names(run_of(config))} | {"ray_ltt_step"}
    assert found.keys() <= written
    only_on_gpus = {"ray_ltt_perf_mfu"}
    drawn = set(re.findall(r"ray_ltt_\w+", DASHBOARD.read_text()))
    assert drawn <= written | only_on_gpus | {"ray_ltt_perf_slowest_ratio"}


def scrape(exporters: list[str]) -> dict[str, float]:
    """Ray sends gauges every few seconds; what has come once step and loss are there."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        for address in exporters:
            with suppress(OSError), urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
                found = {name: float(value) for name, value in SAMPLE.findall(answer.read().decode())}
                if {"ray_ltt_step", "ray_ltt_train_loss"} <= found.keys():
                    return found
        time.sleep(0.5)
    raise AssertionError("no gauge arrived")


def read_rows(run: RunDirectory) -> list[dict[str, float]]:
    return [json.loads(line) for line in run.metrics_path.read_text().splitlines()]


def read_metrics(run: RunDirectory, name: str) -> dict[int, float]:
    return {int(row["step"]): row[name] for row in read_rows(run) if name in row}


def read_names(run: RunDirectory) -> set[str]:
    return {name for row in read_rows(run) for name in row} - {"step", "attempt", "time"}
