"""`ltt drill`: real failures done to a run, and a count of what ranks fetched that finds what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.conftest import Environment
from llm_training_toolkit.data.ledger import Fetched
from llm_training_toolkit.errors import CheckpointError, ConfigError
from llm_training_toolkit.launch.drill.drill import Drill, Order
from llm_training_toolkit.launch.drill.lineage import Stretch, compare, fetched_along, stretches
from llm_training_toolkit.runs import RunDirectory, begin_attempt

EPOCHS = [[4, 4]]
WHOLE = [Fetched(0, epoch, sequence, 10 * epoch + sequence) for epoch in range(2) for sequence in range(4)]


def test_nothing_is_missing_where_each_was_fetched_once() -> None:
    assert compare(WHOLE[::-1], WHOLE, EPOCHS) == (0, 0)


def test_what_was_left_out_or_fetched_twice_is_counted() -> None:
    assert compare(WHOLE[1:], WHOLE, EPOCHS) == (1, 0)
    assert compare([*WHOLE, WHOLE[3], WHOLE[3]], WHOLE, EPOCHS) == (0, 2)
    assert compare([*WHOLE[:2], *WHOLE[1:2], *WHOLE[3:]], WHOLE, EPOCHS) == (1, 1)


def test_other_tokens_at_the_same_place_are_another_sequence() -> None:
    assert compare([WHOLE[0]._replace(tokens=-1), *WHOLE[1:]], WHOLE, EPOCHS) == (1, 0)


def test_an_epoch_that_another_follows_has_to_be_whole_whatever_the_undisturbed_run_did() -> None:
    assert compare(WHOLE[1:6], WHOLE[1:6], EPOCHS) == (1, 0)
    assert compare(WHOLE[:6], WHOLE[:6], EPOCHS) == (0, 0)


def test_the_lineage_takes_of_each_attempt_the_steps_that_others_went_on_from(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for resumed, steps in ((None, 7), ("step_000000005_a1", 6), ("step_000000005_a1", 9)):
        number = begin_attempt(run, {"resumed": resumed})
        run.ledger.mkdir(exist_ok=True)
        first = 5 if resumed else 0
        lines = [json.dumps({"step": step, "fetched": [[0, 0, step, number]]}) for step in range(first + 1, steps + 1)]
        (run.ledger / f"attempt_{number}_rank_0.jsonl").write_text("\n".join([*lines, '{"step": 9, "fet']))
    lineage = stretches(run, "step_000000009_a3")
    assert lineage == [Stretch(1, 0, 5), Stretch(3, 5, 9)]
    found = fetched_along(run, lineage)
    assert [(each.sequence, each.tokens) for each in found] == [(s, 1) for s in range(1, 6)] + [
        (s, 3) for s in range(6, 10)
    ]
    with pytest.raises(CheckpointError, match="nothing is known of the attempt"):
        stretches(run, "step_000000009_a7")


def drill(config: Path, *arguments: str, environment: Environment | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "llm_training_toolkit", "drill", str(config), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


SECTIONS: dict[str, Any] = {
    "train": {"steps": 200, "global_batch": 4, "micro_batch": 2},
    "checkpoint": {"every": 10, "keep": 3},
    "cluster": {"workers": 0},
}


def test_a_failure_that_the_run_cannot_have_is_refused(launch_config: Callable[..., Path]) -> None:
    config = launch_config("refused", cluster={"workers": 0})
    for kinds in (["worker", "flood"], ["hang"]):
        with pytest.raises(ConfigError, match=r"this run can have worker, driver, saving, truncated$"):
            Drill(Order(config, (), 1, kinds, 0, "20s"), print)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_is_killed_while_it_saves_and_loses_its_newest_checkpoint_loses_nothing(
    launch_config: Callable[..., Path],
) -> None:
    config = launch_config("drilled", **SECTIONS)
    found = drill(config, "--kills", "2", "--kinds", "saving,truncated", "--seed", "1")
    assert [each["kind"] for each in found["failures"]] == ["saving", "truncated"]
    assert (found["sequences_missing"], found["sequences_doubled"], found["max_loss_difference"]) == (0, 0, 0.0)
    assert found["weights_equal"] is True
    split: dict[str, float] = found["goodput"]
    assert sum(split.values()) == pytest.approx(found["wall_seconds"], rel=0.15)
    assert split["idle"] > 0


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_on_ray_a_worker_and_the_driver_are_killed(
    launch_config: Callable[..., Path], ray_environment: Environment
) -> None:
    sections = {**SECTIONS, "train": {**SECTIONS["train"], "steps": 80}, "cluster": {"workers": 2}}
    config = launch_config("drilled-on-ray", **sections)
    found = drill(config, "--kills", "2", "--kinds", "worker,driver", "--seed", "3", environment=ray_environment)
    assert len(found["failures"]) == 2
    assert (found["sequences_missing"], found["sequences_doubled"], found["max_loss_difference"]) == (0, 0, 0.0)
    assert found["weights_equal"] is True
