"""`model.compile` on a rank: what its device and compiler make of it, and the error of a compiler that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.plan import make_plan
from llm_training_toolkit.worker.compilation import build_compile_error, resolve_compilation
from tiny_runs import tiny_config

CONTEXT = RunContext(0, 1, torch.device("cpu"))


def test_auto_compiles_nothing_on_a_cpu_and_says_so(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path)
    planned = make_plan(config)
    assert "compile" in planned.estimated
    plan = resolve_compilation(config, planned, CONTEXT, None)
    assert (plan.compile, plan.compile_reason) == (False, "on CPUs little is gained")
    assert plan.notes[0].startswith("model.compile = false (auto): ")
    off = tiny_config(tmp_path, tmp_path, model={"compile": False})
    assert resolve_compilation(off, make_plan(off), CONTEXT, None) == make_plan(off)


@pytest.mark.parametrize("compiler", [None, "/no/such/compiler"])
def test_what_a_rank_cannot_compile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str | None
) -> None:
    if compiler is not None:
        monkeypatch.setenv("CXX", compiler)
    attention = "varlen" if compiler is None else "sdpa"
    config = tiny_config(tmp_path, tmp_path, model={"compile": True, "attn_implementation": attention})
    with pytest.raises(PlanError, match=r"model\.compile = true: "):
        resolve_compilation(config, make_plan(config), CONTEXT, None)


def test_a_compiler_that_fails_is_an_error_with_a_way_out() -> None:
    error = build_compile_error(RuntimeError("no kernel\nmany more lines"))
    assert "RuntimeError: no kernel)" in str(error)
    assert "Set model.compile to false" in str(error)
    assert "more lines" not in str(error)
