"""A run that is evaluated: by its tasks when it finishes, and by a person afterwards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fork_server
from launching import command, run_of
from llm_training_toolkit.evaluation.documents import read_held_out_documents
from llm_training_toolkit.evaluation.model import EvalModel

pytestmark = [pytest.mark.slow]
STEPS = 6


@pytest.fixture(scope="module")
def trained(launch_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file of a finished run in fp32 with two tasks, one of which cannot be done, and what was said."""
    config = launch_config(
        "evaluated",
        train={"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
        cluster={"workers": 0},
        export={"at_end": True},
        eval={"tasks": [{"task": "humaneval", "data": "nowhere.jsonl"}, {"task": "infill", "limit": 3}]},
    )
    done = fork_server.run(command(config), capture_output=True, check=True, cwd=config.parent)
    return config, done.stdout


def evaluated(*arguments: object, **options: Any) -> Any:
    verb = [sys.executable, "-m", "llm_training_toolkit", "evaluate", *map(str, arguments), "--json"]
    done = fork_server.run(verb, capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def metrics(config: Path) -> dict[str, float]:
    """The last value of every metric."""
    rows = [json.loads(line) for line in run_of(config).metrics_path.read_text().splitlines()]
    return {name: value for row in rows for name, value in row.items()}


def test_tasks_are_carried_out_when_the_run_finishes(trained: tuple[Path, str]) -> None:
    config, said = trained
    assert "infill: exact_match" in said
    assert "eval.tasks: humaneval was not evaluated" in said
    assert "nowhere.jsonl: no such file" in said
    found = metrics(config)
    assert found["eval/infill_documents"] == 3
    assert 0.0 <= found["eval/infill_edit_similarity"] <= 1.0
    [kept] = run_of(config).evaluations_dir.glob(f"infill_step_{STEPS:09d}_*.json")
    assert json.loads(kept.read_text())["data"] == "held out by evaluated"
    assert len(kept.with_suffix(".items.jsonl").read_text().splitlines()) == 3


def test_the_perplexity_of_what_is_held_out_is_that_of_the_training(trained: tuple[Path, str], tmp_path: Path) -> None:
    config, _ = trained
    run = run_of(config)
    found = evaluated(run.path, "--task", "perplexity")
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(metrics(config)[f"eval/{name}"], rel=1e-6)
    assert (found["run"], found["step"]) == ("evaluated", STEPS)

    origin = EvalModel(run.path, device="cpu").origin
    assert origin is not None
    for number, document in enumerate(read_held_out_documents(origin)):
        (tmp_path / f"{number}.py").write_text(document.text)
    as_files = evaluated(run.path, "--task", "perplexity", "--data", tmp_path)
    assert as_files["documents"] == number + 1
    assert (as_files["tokens"], as_files["bytes"]) == (found["tokens"], found["bytes"])
    assert as_files["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_evaluations_are_kept_drawn_and_compared(trained: tuple[Path, str]) -> None:
    config, _ = trained
    run = run_of(config)
    found = evaluated(run.export_dir, "--task", "infill", "--limit", 2, "--middle", "span")
    points = EventAccumulator(str(run.evaluations_dir / "tb"))
    points.Reload()
    [point] = [each for each in points.Scalars("eval/infill_documents") if each.value == 2]
    assert point.step == STEPS
    assert found in evaluated("--compare", run.path)


def test_a_finished_run_takes_up_another_task(trained: tuple[Path, str]) -> None:
    config, _ = trained
    again = command(config, 'eval.tasks=[{"task": "infill", "limit": 1}]')
    done = fork_server.run(again, capture_output=True, check=True, cwd=config.parent)
    assert "is finished" in done.stdout
    assert "infill: exact_match" in done.stdout
    assert metrics(config)["eval/infill_documents"] == 1
    once_more = fork_server.run(again, capture_output=True, check=True, cwd=config.parent)
    assert "infill:" not in once_more.stdout
