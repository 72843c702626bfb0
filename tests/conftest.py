"""Fixtures that tests share: a small prepared run, and pools of real ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from durations import Durations, slowness
from llm_training_toolkit.config import Config, dump_config_json, parse_config
from llm_training_toolkit.data.prepare.epochs import prepare_run_data
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool

# The seconds of an example or of its data depend on the machine, and on what else it does.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

LIMIT = 20.0  # seconds for a test without a marker, on a processor as fast as that of `durations.slowness`

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""A Qwen3 of 0.1 million parameters."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep the durations of all tests, and refuse slow ones without a marker."""
    config.pluginmanager.register(Durations(config.rootpath, LIMIT * slowness()))


def tiny_config(corpus: Path, runs: Path, **sections: dict[str, Any]) -> Config:
    """A run of a tiny model on a small corpus; sections are merged into it.

    In fp32: a processor without instructions for bf16 takes twenty times as long for it.
    """
    data: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(runs)},
        "model": {"name": "qwen3-0.6b", "config_overrides": dict(SHAPE), "loss_chunk_size": 64},
        "tokenizer": {"train": {"vocab_size": 512}},
        "data": {
            "sequence_length": 64,
            "sources": [{"path": str(corpus), "format": "code", "fim": {"rate": 0.5, "loss": "middle"}}],
            "eval": {"fraction": 0.1},
        },
        "train": {"steps": 9, "global_batch_size": 11, "micro_batch_size": 2, "precision": "fp32"},
        "optim": {"lr": 1e-3, "warmup": 2},
        "checkpoint": {"interval": 100, "keep_latest": 100},
        "eval": {"interval": 100},
        "export": {"at_end": False},
        "cluster": {"workers": 2},
        "failures": {"on_loss_spike": "ignore"},  # a few hundred tokens a step vary as much as spikes do
    }
    for name, values in sections.items():
        data[name] = data.get(name, {}) | values
    return parse_config(data, "test")


def write_corpus(directory: Path, documents: int = 60) -> Path:
    """Small files of code of ragged lengths, each different."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        lines = [
            f"def function_{number}_{line}(a, b={line}):\n    return a * {number} + b\n"
            for line in range(1 + number % 7)
        ]
        (directory / f"module_{number:03d}.py").write_text("\n".join(lines))
    return directory


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of code."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "code")


@pytest.fixture(scope="session")
def prepared_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run directory ready for workers: resolved configuration and receipt. Copied by `fresh_run`, never run."""
    runs = tmp_path_factory.mktemp("runs")
    config = tiny_config(corpus, runs)
    run = RunDirectory(runs / "tiny")
    run.dataset_info_path.parent.mkdir(parents=True)
    run.dataset_info_path.write_text(
        prepare_run_data(config, lambda _stage, _done, _total: None).dataset_info.to_json()
    )
    run.resolved_config_path.write_text(dump_config_json(config))
    run.config_path.write_text("# a test's run\n")
    return run


@pytest.fixture
def fresh_run(prepared_run: RunDirectory, tmp_path: Path) -> Callable[[str], RunDirectory]:
    """Makes copies of the prepared run, by name."""

    def make(name: str) -> RunDirectory:
        shutil.copytree(prepared_run.path, tmp_path / name)
        return RunDirectory(tmp_path / name)

    return make


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """Pools of one, two or three ranks, started when first asked for."""
    started: dict[int, RankPool] = {}
    log = tmp_path_factory.mktemp("ranks")

    def pool(world_size: int) -> RankPool:
        if world_size not in started or not started[world_size].alive:
            started[world_size] = RankPool(world_size, log)
        return started[world_size]

    yield pool
    for each in started.values():
        each.close()
