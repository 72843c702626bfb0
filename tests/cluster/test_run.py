"""`ltt train` on a real Ray cluster: through, stopped, killed; always the run that nothing had disturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import fork_server
import rank_tasks
from launching import Environment, command, run_of, wait_for_step
from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.runs.attempts import begin_attempt, find_last_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory, lock_run_directory
from run_results import read_losses

Start = Callable[[list[str]], subprocess.Popen[str]]
STEPS = 80
SECTIONS = {
    "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2},
    "checkpoint": {"interval": 20, "keep_latest": 2},
    "eval": {"interval": 40},
}


def assert_same_run(found: RunDirectory, wanted: RunDirectory) -> None:
    assert read_losses(found) == read_losses(wanted)
    states = []
    for run in (found, wanted):
        directory = find_latest_checkpoint(run.checkpoints_dir)
        assert directory is not None
        states.append(rank_tasks.read_state(directory))
    for name, values in states[1].items():
        assert np.array_equal(states[0][name], values), name


@pytest.fixture(scope="module")
def undisturbed(launch_config: Callable[..., Path], ray_environment: Environment) -> Path:
    config = launch_config("undisturbed", **SECTIONS, export={"at_end": True})
    # A start of its own: what imports write would be on the screen.
    done = subprocess.run(command(config, "--json"), env=ray_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["status"], answer["step"]) == ("finished", STEPS)
    assert Path(answer["checkpoint"]).is_dir()
    (config.parent / "screen").write_text(done.stderr)
    return config


def test_a_run_leaves_all_that_the_run_directory_promises(undisturbed: Path) -> None:
    run = run_of(undisturbed)
    for path in (
        run.config_path,
        run.resolved_config_path,
        run.plan_path,
        run.environment_path,
        run.metrics_path,
        run.dataset_info_path,
        run.export_dir,
    ):
        assert path.exists(), path
    assert sorted(path.name for path in run.get_log_dir(1).iterdir()) == ["rank_0.log", "rank_1.log"]
    assert [path.name for path in sorted(run.checkpoints_dir.iterdir())] == ["step_000000060_a1", "step_000000080_a1"]
    assert json.loads((run.attempts_dir / "0001.json").read_text())["state"] == "finished"
    assert list(run.tensorboard_dir.glob("events.*"))
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    evaluated = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert sorted(evaluated) == [0, 40, STEPS]
    assert evaluated[STEPS] < 0.7 * evaluated[0]


def test_the_screen_shows_progress_and_no_noise(undisturbed: Path) -> None:
    screen = (undisturbed.parent / "screen").read_text()
    assert "step 80/80  loss" in screen
    assert "held-out loss" in screen
    for noise in ("INFO", "WARNING", "Warning", "DeepSpeed info", "(RayTrainWorker", "Traceback"):
        assert noise not in screen, noise


def test_tensorboard_has_the_curves_and_the_texts(undisturbed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_of(undisturbed).tensorboard_dir))
    events.Reload()
    tags = events.Tags()
    wanted = {
        "train/loss",
        "optim/lr",
        "optim/grad_norm",
        "perf/tokens_per_second",
        "perf/memory_gb",
        "eval/loss",
        "perf/tflops",
    }
    assert wanted <= set(tags["scalars"])
    assert len(events.Scalars("train/loss")) == STEPS
    texts = set(tags["tensors"])
    assert "configuration/text_summary" in texts
    assert any(name.startswith("samples/") for name in texts)


def test_a_finished_run_is_left_alone(undisturbed: Path, ray_environment: Environment) -> None:
    before = run_of(undisturbed).metrics_path.read_text()
    done = fork_server.run(command(undisturbed), env=ray_environment, capture_output=True)
    assert done.returncode == 0
    assert "is finished" in done.stdout
    assert run_of(undisturbed).metrics_path.read_text() == before


def test_another_identity_is_refused_with_the_difference(undisturbed: Path, ray_environment: Environment) -> None:
    changed = command(undisturbed, "optim.weight_decay=0.2")
    done = fork_server.run(changed, env=ray_environment, capture_output=True)
    assert done.returncode == 2
    assert "optim.weight_decay" in done.stderr
    assert "0.2" in done.stderr
    assert "--accept optim.weight_decay" in done.stderr


def test_a_run_stopped_interrupted_and_killed_loses_nothing(
    undisturbed: Path, launch_config: Callable[..., Path], ray_environment: Environment
) -> None:
    config = launch_config("disturbed", **SECTIONS)
    start = partial(fork_server.popen, env=ray_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    a_stop_saves_and_exits_75(config, start)
    a_second_interrupt_leaves_at_once(config, start)
    without_a_restart_left_the_cause_is_said(config, start)
    a_killed_worker_is_replaced(config, start)
    assert_same_run(run_of(config), run_of(undisturbed))


def a_stop_saves_and_exits_75(config: Path, start: Start) -> None:
    with start(command(config, "--json")) as process:
        wait_for_step(run_of(config), 5, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=900)
    assert process.returncode == 75, err
    answer = json.loads(out)
    assert answer["status"] == "stopped"
    assert 5 <= answer["step"] < STEPS
    assert Path(answer["checkpoint"]).name == f"step_{answer['step']:09d}_a1"


def a_second_interrupt_leaves_at_once(config: Path, start: Start) -> None:
    before = find_latest_checkpoint(run_of(config).checkpoints_dir)
    assert before is not None
    with start(command(config, "--json")) as process:
        wait_for_step(run_of(config), 25, process)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=900)
    assert process.returncode == 75, err
    assert f"resuming from {before.name}" in err
    assert json.loads(out)["status"] == "stopped"


def without_a_restart_left_the_cause_is_said(config: Path, start: Start) -> None:
    with start(command(config, "failures.max_failures=0")) as process:
        kill_rank_0(config, 45, process)
        _, err = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "rank 0 failed" in err
    assert "All restarts (failures.max_failures = 0) are used up; the same command resumes" in err
    assert "Traceback" not in err


def a_killed_worker_is_replaced(config: Path, start: Start) -> None:
    run = run_of(config)
    with start(command(config, "--json")) as process:
        kill_rank_0(config, 65, process)
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert json.loads(out)["status"] == "finished"
    states = [read_attempt_record(run, number)["state"] for number in range(1, find_last_attempt(run) + 1)]
    assert states[0] == "stopped"  # the second one was left at once: it may have come as far as that, or not
    assert states[2:] == ["failed", "failed", "finished"]


def kill_rank_0(config: Path, step: int, process: subprocess.Popen[str]) -> None:
    run = run_of(config)
    wait_for_step(run, step, process)
    os.kill(read_attempt_record(run, find_last_attempt(run))["pid"], signal.SIGKILL)


def test_a_command_whose_run_was_begun_anew_leaves_it_alone(
    launch_config: Callable[..., Path], ray_environment: Environment
) -> None:
    config = launch_config("anew", **SECTIONS | {"train": SECTIONS["train"] | {"steps": 5_000}})
    run = run_of(config)
    with fork_server.popen(
        command(config), env=ray_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        wait_for_step(run, 2, process)
        rank_0 = read_attempt_record(run, 1)["pid"]
        run.path.rename(run.path.with_name("removed"))
        with lock_run_directory(run):
            assert begin_attempt(run, {"workers": 1}) == 1
            os.kill(rank_0, signal.SIGKILL)
            _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "another command has taken over this run" in err
    assert find_last_attempt(run) == 1
    assert read_attempt_record(run, 1)["state"] == "running"


def test_an_error_of_ours_ends_the_run_at_once_with_its_words(
    undisturbed: Path, tmp_path: Path, ray_environment: Environment
) -> None:
    run = RunDirectory(tmp_path / "undisturbed")
    shutil.copytree(run_of(undisturbed).path, run.path)
    for manifest in run.checkpoints_dir.glob("*/manifest.json"):
        manifest.write_text(manifest.read_text().replace("model.norm.weight", "model.other.weight"))
    longer = command(undisturbed, f"run.dir={tmp_path}", f"train.steps={STEPS + 2}", "--extend")
    done = fork_server.run(longer, env=ray_environment, capture_output=True)
    assert done.returncode == 1
    assert "not a checkpoint of this model" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list(run.attempts_dir.iterdir())) == 2
