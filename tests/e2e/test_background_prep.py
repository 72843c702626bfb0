"""Later epochs are prepared while the earlier ones train: the same run as with all of them prepared before."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import fork_server
from launching import command, run_of, wait_for_step
from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.runs.directory import parse_checkpoint_name
from run_results import list_losses
from tiny_runs import write_corpus

pytestmark = [pytest.mark.slow]


def sections(corpus: Path, cache: Path, steps: int) -> dict[str, Any]:
    source = {"path": str(corpus), "format": "code", "fim": {"rate": 0.5}}
    return {
        "train": {"steps": steps, "global_batch_size": 4, "micro_batch_size": 4},
        "data": {"sources": [source], "sequence_length": 64, "eval": {"fraction": 0.1}, "cache": str(cache)},
        "cluster": {"workers": 0},
        "export": {"at_end": False},
    }


def epochs(config: Path) -> int:
    return len(json.loads(run_of(config).dataset_info_path.read_text())["streams"][0]["epochs"])


def preparing(process: subprocess.Popen[str]) -> psutil.Process:
    """The process that prepares later epochs for a run."""
    children = psutil.Process(process.pid).children(recursive=True)
    (ahead,) = [child for child in children if "llm_training_toolkit.setup.background_prep" in child.cmdline()]
    return ahead


def test_the_run_is_the_one_with_every_epoch_prepared_before(
    launch_config: Callable[..., Path], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "code", documents=40)
    ahead = launch_config("ahead", **sections(corpus, tmp_path / "one", 60))
    before = launch_config("before", **sections(corpus, tmp_path / "two", 60))
    command_of_before = command(before)
    prepare = [*command_of_before[:3], "prepare", *command_of_before[4:], "--json"]
    prepared = json.loads(fork_server.run(prepare, check=True, capture_output=True).stdout)
    for config in (ahead, before):
        done = fork_server.run(command(config), capture_output=True)
        assert done.returncode == 0, done.stderr
    assert list_losses(run_of(ahead)) == list_losses(run_of(before))
    assert epochs(ahead) == epochs(before) > 2
    assert prepared["sequences"] >= 60 * 4
    assert not (run_of(before).path / "logs" / "preparation.log").exists()  # nothing was left to prepare
    assert (run_of(ahead).path / "logs" / "preparation.log").read_text() == ""


def test_documents_that_change_while_the_run_trains_stop_it_in_words(
    launch_config: Callable[..., Path], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "code", documents=40)
    config = launch_config("changed", **sections(corpus, tmp_path / "cache", 5000))
    with fork_server.popen(command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_step(run_of(config), 3, process)
        ahead = preparing(process)
        process.send_signal(signal.SIGSTOP)  # or the run would use up what is prepared before the other process ends
        sorted(corpus.iterdir())[5].write_text("x = 1\n")
        while ahead.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.1)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=900)
    assert process.returncode == 1, err
    assert "later epochs cannot be prepared, the run ends before them" in out + err
    assert "changed" in err
    assert 0 < len(list_losses(run_of(config))) < 5000


def test_nothing_is_prepared_for_a_run_that_was_begun_anew(launch_config: Callable[..., Path], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "code", documents=40)
    config = launch_config("anew", **sections(corpus, tmp_path / "cache", 5000))
    run = run_of(config)
    with fork_server.popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for_step(run, 1, process)
        process.send_signal(signal.SIGSTOP)
        ahead = preparing(process)
        ahead.suspend()
        known = json.loads(run.dataset_info_path.read_text())
        run.path.rename(run.path.with_name("removed"))
        run.dataset_info_path.parent.mkdir(parents=True)
        anew = json.dumps(known | {"fingerprint": "of other documents"})
        run.dataset_info_path.write_text(anew)
        ahead.resume()
        while ahead.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.1)
        process.kill()
    assert run.dataset_info_path.read_text() == anew
    assert not run.preparation_state_path.exists()


def test_a_stop_while_waiting_leaves_a_checkpoint(launch_config: Callable[..., Path], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "code", documents=40)
    config = launch_config("waiting", **sections(corpus, tmp_path / "cache", 5000))
    with fork_server.popen(command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_step(run_of(config), 1, process)
        ahead = preparing(process)
        ahead.suspend()
        reached, looks = -1, 0
        while looks < 4:  # until the epochs that are there are used up: a busy machine pauses for seconds, too
            now = len(list_losses(run_of(config)))
            reached, looks = now, looks + 1 if now == reached else 0
            time.sleep(2)
        process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 300
        while find_latest_checkpoint(run_of(config).checkpoints_dir) is None and time.monotonic() < end:
            time.sleep(0.1)
        ahead.resume()
        out, err = process.communicate(timeout=900)
    assert process.returncode == 75, err
    assert "waits for data of the next epoch" in out + err
    assert json.loads((run_of(config).path / "attempts" / "0001.json").read_text())["state"] == "stopped"
    saved = find_latest_checkpoint(run_of(config).checkpoints_dir)
    assert saved is not None
    assert parse_checkpoint_name(saved) == (reached, 1)
    assert not list((tmp_path / "cache").rglob(".*.*.*"))  # nothing half built


def test_a_run_that_has_begun_keeps_its_weights(launch_config: Callable[..., Path], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "code", documents=40)
    made = sections(corpus, tmp_path / "cache", 3)
    config = launch_config("weights", **made)
    weighted = f"data.sources=[{{path: {corpus}, format: code, fim: {{rate: 0.5}}, weight: 1.0}}]"
    done = fork_server.run(command(config), capture_output=True)
    assert done.returncode == 0, done.stderr
    again = fork_server.run(
        command(config, weighted, "train.steps=5", "--extend", "--accept", "data.sources"),
        capture_output=True,
    )
    assert again.returncode == 2
    assert "the weights of a run that has begun cannot change" in again.stderr
