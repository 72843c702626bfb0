"""A model directory and a server that the tests of serving share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from served import Served, save_tiny_model, serve_in_thread


@pytest.fixture(scope="package")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="package")
def served(model_directory: Path) -> Iterator[Served]:
    with serve_in_thread(model_directory) as server:
        yield server
