"""Script of the experiment templates: only a finished run with a validation loss is a result."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

import llm_training_toolkit as ltt

TEMPLATES = Path(__file__).parents[2] / "experiments" / "templates"


def test_a_run_that_is_not_a_result_ends_the_experiment(tmp_path: Path) -> None:
    for path in (TEMPLATES / "run.py", TEMPLATES / "qwen" / "experiment.yaml"):
        shutil.copy(path, tmp_path)
    check_result = runpy.run_path(str(tmp_path / "run.py"))["check_result"]
    stopped, finished = ltt.TrainResult("a", 2, "stopped", None), ltt.TrainResult("a", 9, "finished", None)
    with pytest.raises(SystemExit, match=r"^wide, seed 1: stopped at step 2: run the command again$"):
        check_result("wide", 1, stopped, [[2, 7.5]])
    with pytest.raises(SystemExit, match=r"^wide, seed 1: finished at step 9 without a validation loss"):
        check_result("wide", 1, finished, [])
    check_result("wide", 1, finished, [[9, 7.5]])
