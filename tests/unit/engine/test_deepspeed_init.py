"""Setup of DeepSpeed: it probes no operators, because probing runs compilers, and imports nothing to autotune."""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import pytest

import fork_server
from llm_training_toolkit.engine import prepare_deepspeed


@pytest.fixture
def never_probed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The module as it is before anything looks into its table of operators."""
    names: dict[str, Any] = vars(deepspeed.ops)
    monkeypatch.setitem(names, "__compatible_ops__", {})
    del names["__compatible_ops__"]
    return names


def test_no_operator_is_probed_on_a_gpu(never_probed: dict[str, Any]) -> None:
    prepare_deepspeed("cuda")
    assert "__compatible_ops__" not in never_probed


def test_on_a_cpu_shared_memory_is_declared_unavailable_without_a_probe(never_probed: dict[str, Any]) -> None:
    prepare_deepspeed("cpu")
    assert never_probed["__compatible_ops__"] == {"deepspeed_shm_comm": False}


@pytest.mark.slow  # the server imports for seconds
def test_mlflow_is_left_to_the_trackers() -> None:
    """Commands of the server find what `prepare_deepspeed` has imported."""
    code = (
        "import sys; print('mlflow' in sys.modules, 'deepspeed' in sys.modules); import mlflow; print(mlflow.__name__)"
    )
    said = fork_server.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert said.split() == ["False", "True", "mlflow"]
