"""Training begins with the first partition; deaths of the preparation and of the run in between lose nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import fork_server
from launching import command, run_of, wait_for_step
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.launch.drill.data_audit import audit_sequences, read_attempt_spans, read_fetched_sequences
from llm_training_toolkit.runs.directory import RunDirectory
from run_results import list_losses, newest_checkpoint, read_losses
from tiny_runs import write_corpus

pytestmark = [pytest.mark.slow]

PARTITIONS = 4
STEPS = 70
"""Of four sequences each: more than the first epoch."""


def sections(corpus: Path, cache: Path) -> dict[str, Any]:
    source = {"path": str(corpus), "format": "code"}
    return {
        "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 4},
        "data": {
            "sources": [source],
            "sequence_length": 64,
            "eval": {"fraction": 0.1},
            "cache": str(cache),
            "partitions": PARTITIONS,
        },
        "checkpoint": {"interval": 5},
        "cluster": {"workers": 0},
        "failures": {"on_loss_spike": "ignore", "log_samples": True},
    }


def read_info(run: RunDirectory) -> DatasetInfo:
    return DatasetInfo.from_json(run.dataset_info_path.read_text())


def list_tokens(run: RunDirectory) -> list[str]:
    """Partitions whose tokens are on disk."""
    return sorted(path.name for path in Path(read_info(run).directory).glob("tokens-partition*"))


def find_preparation(process: subprocess.Popen[str]) -> psutil.Process:
    """The process that prepares later partitions, before it has imported what it needs for that."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        for child in psutil.Process(process.pid).children(recursive=True):
            if "llm_training_toolkit.setup.background_prep" in child.cmdline():
                return child
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise TimeoutError("no later partition is prepared")


def test_deaths_of_the_preparation_and_of_the_run_lose_nothing(
    launch_config: Callable[..., Path], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "code", documents=60)
    calm, hurt = (launch_config(name, **sections(corpus, tmp_path / name)) for name in ("calm", "hurt"))
    run, undisturbed = run_of(hurt), run_of(calm)

    # 1. Training begins while one partition is there. The process that prepares the others is killed.
    with fork_server.popen(command(hurt), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        preparation = find_preparation(process)
        preparation.suspend()
        wait_for_step(run, 3, process)
        assert len(list_tokens(run)) == 1 < PARTITIONS
        (stream,) = read_info(run).streams
        assert len(stream.epochs) == 1
        preparation.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=900)
    assert process.returncode == 1, err
    assert "later data cannot be prepared, the run ends before it" in out + err
    assert len(list_tokens(run)) == 1
    assert max(read_losses(run)) == stream.epochs[0].sequences // 4  # every step of the first partition

    # 2. The run goes on, and is killed in the next one.
    begun = max(read_losses(run))
    with fork_server.popen(command(hurt), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_step(run, begun + 2, process, seconds=120)
        process.kill()
        process.communicate(timeout=900)
    assert begun + 2 <= max(read_losses(run)) < STEPS

    # 3. The run comes to its end.
    for config in (hurt, calm):
        done = fork_server.run(command(config), capture_output=True)
        assert done.returncode == 0, done.stderr
    assert len(list_tokens(run)) == PARTITIONS
    assert read_losses(run) == read_losses(undisturbed)
    assert list(read_losses(run)) == list(range(1, STEPS + 1))
    assert list_losses(undisturbed) == list(read_losses(undisturbed).values())

    # Each sequence is in the final weights exactly once, and the sample log says so.
    found, wanted = (
        read_fetched_sequences(each, read_attempt_spans(each, newest_checkpoint(each).name))
        for each in (run, undisturbed)
    )
    assert found == wanted
    epochs = read_info(run).streams[0].sequences_per_epoch
    assert audit_sequences(found, wanted, [epochs]) == (0, 0)
    assert len(found) == STEPS * 4 > epochs[0]
    times = Counter((each.epoch, each.sequence) for each in found)
    assert all(times[0, number] == 1 for number in range(epochs[0]))
    assert json.loads((run.path / "attempts" / "0003.json").read_text())["state"] == "finished"
