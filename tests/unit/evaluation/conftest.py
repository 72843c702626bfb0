"""Problems of HumanEval's form, for the known model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from known_model import PROBLEM


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the one problem that the model solves."""
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_text(json.dumps(PROBLEM) + "\n")
    return path
