"""`train.micro_batch_size: auto`: free memory, and the micro-batch that follows from the attempt before."""

from __future__ import annotations

import json
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from llm_training_toolkit.config import Config
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import PlanError, TrainingError
from llm_training_toolkit.models.memory import is_out_of_memory, is_out_of_shared_memory, set_allocator_options
from llm_training_toolkit.plan import MemorySettings
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing
from llm_training_toolkit.runs.attempts import (
    begin_attempt,
    end_attempt,
    fail_attempt,
    mark_out_of_memory,
    read_attempt_record,
)
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.worker import micro_batch
from llm_training_toolkit.worker.micro_batch import (
    SmallerMicroBatch,
    _find_previous_settings,
    build_out_of_memory_error,
    check_host_memory,
    describe_memory_load,
    read_container_free_memory,
    resolve_memory_settings,
)
from llm_training_toolkit.worker.spec import WorkerSpec
from tiny_runs import tiny_config


def write_group(group: Path, limit: str, used: int, cached: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    assert read_container_free_memory("0::/\n", tmp_path) == float("inf")
    write_group(tmp_path, "1000", 700, 250)
    assert read_container_free_memory("0::/\n", tmp_path) == 550
    write_group(tmp_path / "job", "400", 350, 0)
    write_group(tmp_path / "job" / "step", "max", 10, 0)
    assert read_container_free_memory("0::/job/step\n", tmp_path) == 50


def test_older_systems_have_a_folder_for_memory(tmp_path: Path) -> None:
    group = tmp_path / "memory" / "job"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("900\n")
    (group / "memory.usage_in_bytes").write_text("500\n")
    (group / "memory.stat").write_text("total_inactive_file 100\n")
    assert read_container_free_memory("5:cpu,cpuacct:/job\n4:memory:/job\n", tmp_path) == 500


def chosen(run: RunDirectory, config: Config) -> int:
    place, _ = resolve_memory_settings(
        WorkerSpec(run, config, cast("DatasetInfo", None)), RunContext(0, 1, torch.device("cpu"))
    )
    rows = place.config.train.micro_batch_size
    assert rows != "auto"
    return rows


def test_an_attempt_learns_from_the_one_before(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path, train={"steps": 3, "global_batch_size": 8, "micro_batch_size": "auto"})
    run = RunDirectory(tmp_path / "run")
    context = RunContext(0, 1, torch.device("cpu"))

    def attempt(rows: int, asked: int | str = "auto") -> int:
        load = {"load": describe_memory_load(config, context), "zero": 0, "activation_checkpointing": "none"}
        return begin_attempt(run, load | {"micro_batch": rows, "asked": asked})

    assert chosen(run, config) == 8, "nothing is known: by the estimate"
    end_attempt(run, attempt(4), "stopped")
    assert chosen(run, config) == 4, "as before, so that a resume repeats every bit"
    path = run.attempts_dir / "0001.json"
    record = json.loads(path.read_text())
    whole = config.engine.model_dump(mode="json", exclude={"tensor_parallel"})  # as before that field was there
    path.write_text(json.dumps(record | {"load": record["load"] | {"engine": whole}}))
    assert chosen(run, config) == 4, "fields that are new and have their defaults change nothing"
    end_attempt(run, attempt(1, asked=1), "stopped")
    assert chosen(run, config) == 4, "a number somebody asked for is not kept"
    number = attempt(4)
    mark_out_of_memory(run, number)
    fail_attempt(run, number, "rank 1: out of memory")
    fail_attempt(run, number, "rank 0: connection closed by peer")
    assert chosen(run, config) == 2, "another rank's failure does not take the mark back"
    assert read_attempt_record(run, number)["error"] == "rank 1: out of memory"
    attempt(2)
    assert chosen(run, config) == 1, "killed before its first step"
    longer = tiny_config(
        corpus, tmp_path, train={"global_batch_size": 8, "micro_batch_size": "auto"}, data={"sequence_length": 32}
    )
    assert chosen(run, longer) == 8, "another load"


def test_an_allocation_that_fails_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(MemoryError())


@pytest.mark.parametrize(
    ("message", "is_known"),
    [
        ("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory", True),
        ("std::bad_alloc", True),
        ("CUDA error: out of memory", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB", True),
        ("HIP out of memory. Tried to allocate 2.00 GiB", True),
        ("HIP error: out of memory", True),
        ("CUDA driver error: out of memory", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("NCCL error in: unhandled cuda error. Last error:\nCuda failure 'out of memory'", True),
        ("NCCL error in: unhandled cuda error. Last error:\nCuda failure 2 'out of memory'", True),
        # Shared memory of a multiprocessor: the same with every micro-batch.
        ("out of resource: shared memory, Required: 114688, Hardware limit: 101376.", False),
        ("No valid triton configs. OutOfResources: out of resource: shared memory, Required: 114688", False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False),
        ("NCCL error in: unhandled cuda error. Last error:\nCuda failure 'an illegal memory access'", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_texts_of_libraries_that_have_no_exception_for_it(message: str, is_known: bool) -> None:
    assert is_out_of_memory(RuntimeError(message)) == is_known
    assert not is_out_of_memory(ValueError(message))
    assert is_out_of_shared_memory(RuntimeError(message)) == ("out of resource: " in message)


def test_the_allocator_keeps_the_options_that_a_person_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    before = torch._C._accelerator_getAllocatorSettings()
    set_allocator_options(torch.device("cuda"))
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert torch._C._accelerator_getAllocatorSettings() == before


@pytest.mark.parametrize(
    ("model", "engine", "device", "said"),
    [
        ("qwen3-32b", {"offload": "optimizer"}, "cpu", "engine.offload = optimizer takes"),
        ("qwen3-0.6b", {"offload": "optimizer"}, "cpu", None),
        ("qwen3-32b", {}, "cuda", "the copy of a checkpoint takes 375 GB"),
        ("qwen3-32b", {}, "cpu", None),  # the choice of the micro-batch knows of the copy
        (
            "qwen3-coder-480b-a35b-instruct lora",
            {"zero_stage": 3},
            "cuda",
            "the largest tensor, while the model is built, takes",
        ),
        ("qwen3-coder-480b-a35b-instruct lora", {}, "cuda", None),  # its base is streamed
    ],
)
def test_host_memory_is_checked_before_anything_starts(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    engine: dict[str, Any],
    device: str,
    said: str | None,
) -> None:
    monkeypatch.setattr(micro_batch, "_measure_free_host_memory", lambda _context: 15e9)
    name, *lora = model.split()
    given = {"name": name, "config_overrides": {}} | ({"path": "a/b", "lora": {"rank": 1}} if lora else {})
    config = tiny_config(corpus, tmp_path, model=given, engine={"zero_stage": 1} | engine)
    context = RunContext(0, 1, torch.device(device))
    with nullcontext() if said is None else pytest.raises(PlanError, match=rf"{said}.* rank 0 has 15 GB free"):
        check_host_memory(config, context)


def test_segments_of_a_gpu_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is removed again afterwards
        monkeypatch.delenv(name)
    set_allocator_options(torch.device("cpu"))
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    set_allocator_options(torch.device("cuda"))
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True,pinned_max_round_threshold_mb:1"
    assert torch._C._accelerator_getAllocatorSettings() == "expandable_segments:True,pinned_max_round_threshold_mb:1"


def test_after_the_smallest_micro_batch_comes_the_next_stage_then_more_recomputation(
    corpus: Path, tmp_path: Path
) -> None:
    asked = tiny_config(corpus, tmp_path, train={"steps": 3, "global_batch_size": 8, "micro_batch_size": "auto"})
    run, context = RunDirectory(tmp_path / "run"), RunContext(0, 2, torch.device("cpu"))

    def after(kind: ActivationCheckpointing, zero: int, workers: int) -> str:
        taken = MemorySettings(kind, 1, zero).apply_to_config(asked)
        error = build_out_of_memory_error(asked, taken, workers, 80.0)
        assert isinstance(error, SmallerMicroBatch if "takes" in str(error) else TrainingError)
        assert re.search(r"The plan counts [\d.]+ GB, of them .*; the device has 80$", str(error)), error
        return str(error).rpartition("takes ")[2].partition(". The plan")[0]

    assert after("none", 0, 2) == "ZeRO 1"
    assert after("none", 3, 2) == "activation checkpointing selective"
    assert after("selective", 0, 1) == "activation checkpointing full", "one worker has nothing to spread"
    assert "use more cluster.workers" in after("full", 3, 2)
    facts = {"load": describe_memory_load(asked, context), "micro_batch": 1, "asked": "auto", "zero": 0}
    mark_out_of_memory(run, begin_attempt(run, facts | {"activation_checkpointing": "none"}))
    assert _find_previous_settings(run, asked, context) == MemorySettings("none", 1, 1)
