"""`ltt train` without Ray: in one process, and under torchrun with several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import fork_server
from launching import command, run_of, wait_for_step
from llm_training_toolkit.runs.attempts import read_attempt_record
from llm_training_toolkit.runs.goodput import read_seconds_by_category
from run_results import list_losses, read_rows

pytestmark = [pytest.mark.slow]
SECTIONS = {"train": {"steps": 40, "global_batch_size": 4, "micro_batch_size": 2}, "cluster": {"workers": 0}}


def test_one_process_stops_with_a_checkpoint_and_resumes(launch_config: Callable[..., Path]) -> None:
    config = launch_config("inline", **SECTIONS)
    arguments = command(config, "train.steps=400", "--json")
    first_began = time.time()  # a start from nothing, as its time counts, too
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(run_of(config), 5, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=900)
    assert process.returncode == 75, err
    stopped = json.loads(out)["step"]
    last_row = read_rows(run_of(config))[-1]["time"]
    first_ended = read_attempt_record(run_of(config), 1)["command_ended"]
    second_began = time.time()
    shorter = command(config, f"train.steps={stopped + 5}", "--extend")
    done = subprocess.run(shorter, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list_losses(run_of(config))) == stopped + 5
    assert "goodput " in done.stdout
    last = read_rows(run_of(config))[-1]
    took = first_ended - first_began + last["time"] - second_began
    assert sum(read_seconds_by_category(last).values()) == pytest.approx(took, rel=0.01)
    to_its_end = first_ended - last_row
    assert read_seconds_by_category(last)["idle"] == pytest.approx(to_its_end, abs=0.01), (
        "what follows a stop is none of the run's"
    )


def test_torchrun_ranks_train_the_same_run_as_one_process(launch_config: Callable[..., Path]) -> None:
    alone = launch_config("alone", **SECTIONS | {"train": {"steps": 5, "global_batch_size": 4, "micro_batch_size": 2}})
    several = launch_config(
        "several", **SECTIONS | {"train": {"steps": 5, "global_batch_size": 4, "micro_batch_size": 2}}
    )
    fork_server.run(command(alone), check=True, capture_output=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    ranks = [*torchrun, "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = subprocess.run(
        [*ranks, *command(several)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert list_losses(run_of(several)) == pytest.approx(list_losses(run_of(alone)), rel=1e-5)
    assert len(list(run_of(several).get_log_dir(1).iterdir())) == 2


def test_changed_documents_are_refused_unless_accepted(launch_config: Callable[..., Path], tmp_path: Path) -> None:
    from tiny_runs import write_corpus

    corpus = write_corpus(tmp_path / "code", documents=30)
    source = {"path": str(corpus), "format": "code"}
    train = {"steps": 2, "global_batch_size": 4, "micro_batch_size": 2}
    data = {"sources": [source], "sequence_length": 64, "eval": {"fraction": 0.1}, "cache": str(tmp_path / "cache")}
    trained = launch_config("own_tokenizer", **SECTIONS | {"train": train, "data": data})
    fork_server.run(command(trained), check=True, capture_output=True)
    tokenizer = json.loads(run_of(trained).dataset_info_path.read_text())["tokenizer_path"]
    given = launch_config("given_tokenizer", **SECTIONS | {"train": train, "data": data})
    choose = ["tokenizer.train=null", f"tokenizer.path={tokenizer}", "model.config_overrides.vocab_size=512"]
    fork_server.run(command(given, *choose), check=True, capture_output=True)

    (corpus / "module_000.py").write_text("print('another document')\n" * 5)
    within = fork_server.run(command(trained, "train.steps=3", "--extend"), capture_output=True)
    assert within.returncode == 0, "its tokens are prepared: the documents are not looked at"
    longer = ["train.steps=200", "--extend"]
    for config, arguments in ((trained, longer), (given, [*choose, *longer])):
        refused = fork_server.run(command(config, *arguments), capture_output=True)
        assert refused.returncode == 2
        assert "documents have changed" in refused.stderr
    accepted = command(given, *choose, *longer, "--accept", "documents")
    done = fork_server.run(accepted, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(list_losses(run_of(given))) == 200
