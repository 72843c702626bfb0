"""On GPUs the largest micro-batch is tried before the first step, and memory that runs out there halves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import trial_pass
from llm_training_toolkit.runs.attempts import has_run_out_of_memory
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool

CHANGES: dict[str, Any] = {
    "model": {"attn_implementation": "sdpa", "activation_checkpointing": "none", "compile": False},
    "engine": {"zero_stage": 0},
    "train": {"micro_batch_size": "auto", "global_batch_size": 8, "steps": 2},
}
OUT_OF_MEMORY = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("library", OUT_OF_MEMORY)
def test_memory_that_runs_out_in_the_trial_halves_the_micro_batch(
    pools: Callable[[int], RankPool], fresh_run: Callable[[str], RunDirectory], library: str
) -> None:
    run = fresh_run("tried")
    [attempts] = pools(1).run(
        trial_pass.train_with_room_for, rows=2, error=OUT_OF_MEMORY[library], run=str(run.path), changes=CHANGES
    )
    assert [each["rows"] for each in attempts] == [8, 4, 2]
    assert [each["ended"] for each in attempts] == ["SmallerMicroBatch", "SmallerMicroBatch", "finished"]
    assert [has_run_out_of_memory(run, number) for number in (1, 2, 3)] == [True, True, False]
    assert [each["passes"] for each in attempts[:2]] == [[(8, True)], [(4, True)]], "before any step"
    assert attempts[2]["passes"][:2] == [(2, True)] * 2, "the second beside the gradients of the first"
    assert len(attempts[2]["passes"]) == 2 + 2 * 4
    assert attempts[2]["step"] == 2


def test_a_kernel_too_large_for_the_gpu_ends_the_run(
    pools: Callable[[int], RankPool], fresh_run: Callable[[str], RunDirectory]
) -> None:
    error = Exception("out of resource: shared memory, Required: 114688, Hardware limit: 101376.")
    [attempts] = pools(1).run(
        trial_pass.train_with_room_for, rows=0, error=error, run=str(fresh_run("large").path), changes=CHANGES
    )
    assert [each["ended"] for each in attempts] == ["TrainingError"]
