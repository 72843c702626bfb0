"""Setup of DeepSpeed: its operators are probed on no device, because probing runs compilers."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest

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
