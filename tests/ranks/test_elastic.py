"""Stop anywhere, resume anywhere: the same ranks bit for bit, other ranks and ZeRO stages from the same state."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rank_tasks
from llm_training_toolkit.checkpoint import CheckpointReader, find_latest_checkpoint, list_complete_checkpoints
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.epochs import prepare_run_data
from llm_training_toolkit.data.sample_log import FetchedSequence, read_sample_log
from llm_training_toolkit.distributed.events import WarningEvent
from llm_training_toolkit.errors import CheckpointError, TrainingError
from llm_training_toolkit.plan import make_plan
from llm_training_toolkit.runs.attempts import find_last_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.goodput import read_seconds_by_category
from rank_pool import RankPool
from run_results import assert_same_state, newest_checkpoint, read_losses

Pools = Callable[[int], RankPool]
Fresh = Callable[[str], RunDirectory]
Undisturbed = Callable[[int, int, str], RunDirectory]
STEPS, STOP = 9, 4
# Workers, and the step at which they stop.
PATHS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "2 to 1 to 2": ((2, 2), (1, 4), (2, None)),
    "3 to 2": ((3, 4), (2, None)),
}


def fetched(run: RunDirectory) -> dict[int, list[FetchedSequence]]:
    """The sequences that all ranks of all attempts fetched, by step, each with a checksum of its tokens."""
    found: dict[int, list[FetchedSequence]] = {}
    for attempt in range(1, find_last_attempt(run) + 1):
        for step, sequences in read_sample_log(run.sample_log_dir, attempt):
            found.setdefault(step, []).extend(sequences)
    return {step: sorted(sequences) for step, sequences in found.items()}


def assert_resumes_as(run: RunDirectory, whole: RunDirectory, steps: range, precision: str) -> None:
    """The losses of these steps are those of the undisturbed run, up to rounding."""
    found, wanted = read_losses(run), read_losses(whole)
    tolerance = 1e-6 if precision == "fp32" else 1e-3
    assert max(abs(found[step] - wanted[step]) / wanted[step] for step in steps) < tolerance


@pytest.fixture(scope="module")
def undisturbed(
    pools: Pools, prepared_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, int, str], RunDirectory]:
    """The run of so many ranks, a ZeRO stage and a precision that nothing disturbed, with its sample log; each once."""

    @cache
    def whole(workers: int, zero: int, precision: str) -> RunDirectory:
        run = RunDirectory(tmp_path_factory.mktemp("undisturbed") / "whole")
        shutil.copytree(prepared_run.path, run.path)
        answers = pools(workers).run(rank_tasks.train_run, run=str(run.path), changes=changed(zero, precision))
        assert answers[0]["status"] == "finished"
        return run

    return whole


def changed(zero: int, precision: str) -> dict[str, dict[str, Any]]:
    return {"engine": {"zero_stage": zero}, "train": {"precision": precision}, "failures": {"log_samples": True}}


@pytest.mark.parametrize(
    ("zero", "precision", "stop"),
    [
        (0, "bf16", 1),
        (0, "fp32", 4),
        (1, "bf16", 4),
        (1, "fp32", 1),
        (2, "bf16", 1),
        (2, "bf16", 4),
        (2, "fp32", 1),
        (3, "bf16", 4),
        (3, "fp32", 1),
        (3, "fp32", 4),
    ],
)
def test_stop_and_resume_is_bitwise_the_undisturbed_run(
    pools: Pools, fresh_run: Fresh, undisturbed: Undisturbed, zero: int, precision: str, stop: int
) -> None:
    changes = changed(zero, precision)
    whole, halves = undisturbed(2, zero, precision), fresh_run("halves")
    stopped = pools(2).run(rank_tasks.train_run, run=str(halves.path), changes=changes, stop_after=stop)
    assert [(answer["status"], answer["step"]) for answer in stopped] == [("stopped", stop)] * 2
    resumed = pools(2).run(rank_tasks.train_run, run=str(halves.path), changes=changes)
    assert resumed[0]["status"] == "finished"
    assert read_losses(halves) == read_losses(whole)
    assert fetched(halves) == fetched(whole)
    assert_same_state(rank_tasks.read_final_state(halves), rank_tasks.read_final_state(whole))
    manifest = CheckpointReader(newest_checkpoint(halves)).manifest
    assert (manifest.step, manifest.attempt) == (STEPS, 2)
    assert manifest.parent == f"step_{stop:09d}_a1"
    assert manifest.tokens == STEPS * 11 * 64


@pytest.mark.parametrize(
    ("zero", "precision", "offloads"),
    [
        (1, "bf16", ("optimizer", "none")),
        (1, "fp32", ("none", "optimizer")),
        (3, "bf16", ("optimizer_and_weights", "none")),
        (3, "fp32", ("optimizer", "optimizer_and_weights")),
    ],
)
def test_state_in_host_memory_changes_nothing_and_may_move_at_a_resume(
    pools: Pools, fresh_run: Fresh, undisturbed: Undisturbed, zero: int, precision: str, offloads: tuple[str, str]
) -> None:
    changes = changed(zero, precision)
    whole, run = undisturbed(2, zero, precision), fresh_run("moved")
    for offload, stop in zip(offloads, (4, None), strict=True):
        changes["engine"] = {"zero_stage": zero, "offload": offload}
        pools(2).run(rank_tasks.train_run, run=str(run.path), changes=changes, stop_after=stop)
    if zero == 3:  # there DeepSpeed adds up the norm of the gradients in another order
        assert_resumes_as(run, whole, range(1, STEPS + 1), precision)
    else:
        assert read_losses(run) == read_losses(whole)
        assert_same_state(rank_tasks.read_final_state(run), rank_tasks.read_final_state(whole))


def test_another_host_and_a_clock_that_went_back_a_day_change_nothing(
    pools: Pools, fresh_run: Fresh, undisturbed: Undisturbed
) -> None:
    changes = changed(2, "bf16") | {"checkpoint": {"interval": 2, "keep_latest": 2}}
    whole, run = undisturbed(2, 2, "bf16"), fresh_run("moved")
    pools(2).run(rank_tasks.train_run, run=str(run.path), changes=changes, stop_after=4)
    tomorrow = time.time() + 86_400
    record = read_attempt_record(run, 1) | {"host": "elsewhere", "pid": os.getpid()}
    ahead = {key: record[key] + 86_400 for key in ("started", "began", "ended")}
    (run.attempts_dir / "0001.json").write_text(json.dumps(record | ahead))
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    run.metrics_path.write_text("".join(json.dumps(row | {"time": row["time"] + 86_400}) + "\n" for row in rows))
    for path in [run.path, *run.path.rglob("*")]:
        os.utime(path, (tomorrow, tomorrow))
    for path in list(run.tensorboard_dir.iterdir()):
        path.rename(path.with_name(path.name.replace(path.name.split(".")[3], f"{int(tomorrow)}")))
    pools(2).run(rank_tasks.train_run, run=str(run.path), changes=changes)
    assert read_losses(run) == read_losses(whole)
    assert fetched(run) == fetched(whole)
    assert_same_state(rank_tasks.read_final_state(run), rank_tasks.read_final_state(whole))
    assert [CheckpointReader(path).manifest.step for path in list_complete_checkpoints(run.checkpoints_dir)] == [8, 9]
    split = read_seconds_by_category(json.loads(run.metrics_path.read_text().splitlines()[-1]))
    assert all(0 <= seconds < 1000 for seconds in split.values())
    curve = EventAccumulator(str(run.tensorboard_dir), size_guidance={"scalars": 0})
    curve.Reload()
    assert [event.step for event in curve.Scalars("train/loss")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("path", "zero", "precision"),
    [
        *((path, zero, "fp32") for path in PATHS for zero in (1, 2, 3)),
        ("2 to 1 to 2", 2, "bf16"),
        ("3 to 2", 3, "bf16"),
    ],
)
def test_workers_that_go_and_come_change_neither_sequences_nor_state_nor_what_follows(
    pools: Pools,
    fresh_run: Fresh,
    undisturbed: Undisturbed,
    tmp_path: Path,
    path: str,
    zero: int,
    precision: str,
) -> None:
    changes, run = changed(zero, precision), fresh_run("elastic")
    for workers, stop in PATHS[path]:
        if saved := find_latest_checkpoint(run.checkpoints_dir):
            target = tmp_path / "gathered" / saved.name
            options: dict[str, Any] = {"run": str(run.path), "checkpoint": str(saved), "directory": str(target)}
            state, _, _ = pools(workers).run(rank_tasks.load_checkpoint, changes=changes, **options)[0]
            assert_same_state(state, rank_tasks.read_state(saved))
        answers = pools(workers).run(rank_tasks.train_run, run=str(run.path), changes=changes, stop_after=stop)
        assert answers[0]["step"] == (stop or STEPS)
    whole = undisturbed(PATHS[path][0][0], zero, precision)
    assert fetched(run) == fetched(whole)
    assert_resumes_as(
        run, whole, range(1, STEPS + 1), precision
    )  # five steps after the last change, seven after the first


@pytest.fixture(scope="module")
def stopped_at(
    pools: Pools, prepared_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A checkpoint of two ranks under ZeRO 2, by precision."""

    @cache
    def checkpoint(precision: str) -> Path:
        run = RunDirectory(tmp_path_factory.mktemp("stopped") / precision)
        shutil.copytree(prepared_run.path, run.path)
        pools(2).run(rank_tasks.train_run, run=str(run.path), changes=changed(2, precision), stop_after=STOP)
        return newest_checkpoint(run)

    return checkpoint


@pytest.mark.parametrize(
    ("zero", "workers", "precision"),
    [
        *((zero, workers, "fp32") for zero, workers in ((0, 1), (0, 3), (1, 3), (2, 3), (3, 3), (3, 1))),
        (0, 3, "bf16"),
        (3, 1, "bf16"),
    ],
)
def test_a_checkpoint_of_two_ranks_resumes_with_any_number_under_any_stage(
    pools: Pools,
    fresh_run: Fresh,
    undisturbed: Undisturbed,
    stopped_at: Callable[[str], Path],
    tmp_path: Path,
    workers: int,
    zero: int,
    precision: str,
) -> None:
    checkpoint, changes = stopped_at(precision), changed(zero, precision)
    run = fresh_run("other")
    target = str(tmp_path / "gathered" / "step_000000004_a9")
    loaded = pools(workers).run(
        rank_tasks.load_checkpoint, run=str(run.path), changes=changes, checkpoint=str(checkpoint), directory=target
    )
    state, _, counters = loaded[0]
    assert_same_state(state, rank_tasks.read_state(checkpoint))
    assert set().union(*(decays for _, decays, _ in loaded)) == {"0.1", "0.0"}
    assert counters == {float(STOP)}

    shutil.copytree(checkpoint, run.checkpoints_dir / checkpoint.name)
    answers = pools(workers).run(rank_tasks.train_run, run=str(run.path), changes=changes)
    assert answers[0]["status"] == "finished"
    assert sorted(read_losses(run)) == list(range(STOP + 1, STEPS + 1))
    assert_resumes_as(run, undisturbed(2, 2, precision), range(STOP + 1, STEPS + 1), precision)


def test_a_finished_run_takes_no_further_step(pools: Pools, fresh_run: Fresh) -> None:
    run = fresh_run("done")
    pools(2).run(rank_tasks.train_run, run=str(run.path))
    before = rank_tasks.read_final_state(run)
    answers = pools(2).run(rank_tasks.train_run, run=str(run.path))
    assert (answers[0]["status"], answers[0]["step"]) == ("finished", STEPS)
    assert_same_state(rank_tasks.read_final_state(run), before)
    assert sorted(read_losses(run)) == list(range(1, STEPS + 1))


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(pools: Pools, fresh_run: Fresh) -> None:
    whole, run = fresh_run("whole"), fresh_run("damaged")
    changes = {"checkpoint": {"interval": 2}}
    pools(2).run(rank_tasks.train_run, run=str(whole.path), changes=changes)
    pools(2).run(rank_tasks.train_run, run=str(run.path), changes=changes, stop_after=5)
    victim = newest_checkpoint(run) / "fragments_00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    answers = pools(2).run(rank_tasks.train_run, run=str(run.path), changes=changes)
    assert any(isinstance(event, WarningEvent) and "damaged" in event.message for event in answers[0]["events"])
    assert_same_state(rank_tasks.read_final_state(run), rank_tasks.read_final_state(whole))


def test_the_best_by_held_out_loss_stays_also_over_a_resume(pools: Pools, fresh_run: Fresh) -> None:
    run = fresh_run("best")
    # The rate is so high that the first step is the best one: losses of 10.0, 16.7, 12.7, 16.7.
    changes = {
        "optim": {"lr": 0.5, "warmup": 1},
        "checkpoint": {"interval": 1, "keep_latest": 1},
        "eval": {"interval": 1},
        "failures": {"on_loss_spike": "ignore"},
    }
    pools(2).run(rank_tasks.train_run, run=str(run.path), changes=changes, stop_after=2)
    left_over = run.get_checkpoint_dir(3, 1)
    left_over.mkdir()
    (left_over / "fragments_00000.safetensors").write_bytes(b"half")
    pools(2).run(rank_tasks.train_run, run=str(run.path), changes=changes, stop_after=4)
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    measured = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row and row["step"] > 0}
    assert min(measured, key=lambda step: measured[step]) == 1
    kept = {
        CheckpointReader(path).manifest.step: CheckpointReader(path).manifest for path in run.checkpoints_dir.iterdir()
    }
    assert sorted(kept) == [1, 4]
    assert kept[1].eval_loss == measured[1]


def test_a_run_over_epochs_ends_with_a_short_step_and_every_sequence_once(pools: Pools, fresh_run: Fresh) -> None:
    run = fresh_run("epoch")
    train = {"steps": None, "epochs": 1, "global_batch_size": 8}
    answers = pools(3).run(rank_tasks.train_run, run=str(run.path), changes={"train": train})
    spec = rank_tasks.build_worker_spec(str(run.path))
    sequences = spec.dataset_info.streams[0].sequences_per_epoch[0]
    assert sequences % 8, "the last step of this test is meant to be short"
    assert (answers[0]["status"], answers[0]["step"]) == ("finished", -(-sequences // 8))
    assert CheckpointReader(newest_checkpoint(run)).manifest.tokens == sequences * 64


def test_a_run_lengthened_after_a_short_step_leaves_out_nothing(pools: Pools, fresh_run: Fresh) -> None:
    run = fresh_run("lengthened")
    spec = rank_tasks.build_worker_spec(str(run.path))
    first = spec.dataset_info.streams[0].sequences_per_epoch[0]
    assert first % 8, "the last step of the first epoch is meant to be short"
    one = {"train": {"steps": None, "epochs": 1, "global_batch_size": 8}}
    pools(2).run(rank_tasks.train_run, run=str(run.path), changes=one)
    config = rank_tasks.build_worker_spec(
        str(run.path), {"train": {"steps": None, "epochs": 2, "global_batch_size": 8}}
    ).config
    dataset_info = prepare_run_data(config, lambda _stage, _done, _total: None).dataset_info
    run.dataset_info_path.write_text(dataset_info.to_json())
    answers = pools(3).run(
        rank_tasks.train_run, run=str(run.path), changes={"train": {"steps": None, "epochs": 2, "global_batch_size": 8}}
    )
    steps = -(-first // 8) + -(-dataset_info.streams[0].sequences_per_epoch[1] // 8)
    assert (answers[0]["status"], answers[0]["step"]) == ("finished", steps)
    manifest = CheckpointReader(newest_checkpoint(run)).manifest
    assert manifest.sequences == dataset_info.total_sequences
    dataloader = PackedDataset(dataset_info, global_batch=8, epochs=2, origin=(-(-first // 8), first))
    seen = [placed for step in range(-(-first // 8), steps) for placed in dataloader.get_step_sequences(step)]
    assert [(placed.epoch, placed.sequence) for placed in seen] == [
        (1, n) for n in range(dataset_info.streams[0].sequences_per_epoch[1])
    ]


def test_a_loss_that_is_not_finite_stops_every_rank_and_names_step_and_documents(
    pools: Pools, fresh_run: Fresh
) -> None:
    run = fresh_run("diverges")
    changes = {"optim": {"lr": 1e20, "warmup": 0, "max_grad_norm": 0.0}, "checkpoint": {"interval": 1}}
    with pytest.raises(TrainingError, match=r"step [2-9]: the (loss|gradient) is n.*module_\d+\.py") as caught:
        pools(2).run(rank_tasks.train_run, run=str(run.path), changes=changes)
    failed_step = int(str(caught.value).split(":")[0].removeprefix("step "))
    assert CheckpointReader(newest_checkpoint(run)).manifest.step == failed_step - 1
    state = rank_tasks.read_final_state(run)
    assert all(np.isfinite(values).all() for name, values in state.items() if name.endswith("weights"))
    assert json.loads((run.attempts_dir / "0001.json").read_text())["state"] == "failed"


def test_weights_of_another_run_start_a_new_one(pools: Pools, fresh_run: Fresh) -> None:
    first, second = fresh_run("first"), fresh_run("second")
    plan = make_plan(rank_tasks.build_worker_spec(str(first.path)).config)
    first.plan_path.write_text(json.dumps(plan.to_json()))
    pools(2).run(rank_tasks.train_run, run=str(first.path))
    tokenizer = rank_tasks.build_worker_spec(str(first.path)).dataset_info.tokenizer_path
    changes = {
        "model": {"init_from": str(first.path), "config_overrides": {}},
        "tokenizer": {"path": tokenizer, "train": None},
    }
    pools(2).run(rank_tasks.train_run, run=str(second.path), changes=changes)
    assert read_losses(second)[1] < read_losses(first)[1] - 0.3
    assert CheckpointReader(newest_checkpoint(second)).manifest.step == STEPS


def test_weights_of_another_run_keep_the_positions_they_were_trained_with(
    pools: Pools, fresh_run: Fresh, tmp_path: Path
) -> None:
    from llm_training_toolkit.models import build_model

    yarn = {"rope_type": "yarn", "rope_theta": 5e6, "factor": 4.0, "original_max_position_embeddings": 64}
    first, second = fresh_run("first"), fresh_run("second")
    spec = rank_tasks.build_worker_spec(str(first.path))
    published = {**make_plan(spec.config).hf_config, "rope_parameters": yarn, "rms_norm_eps": 1e-5}
    model: Any = build_model(published, precision="bf16", attention="sdpa")
    model.save_pretrained(tmp_path / "published")
    tokenizer = {"path": spec.dataset_info.tokenizer_path, "train": None}
    for run, origin in ((first, {"path": str(tmp_path / "published")}), (second, {"init_from": str(first.path)})):
        changes = {"model": {"config_overrides": {}, **origin}, "tokenizer": tokenizer}
        pools(1).run(rank_tasks.train_run, run=str(run.path), changes=changes, stop_after=1)
        found = CheckpointReader(newest_checkpoint(run)).manifest.extra["hf_config"]
        assert found["rope_parameters"].items() >= yarn.items()
        assert found["rms_norm_eps"] == 1e-5


def test_a_checkpoint_of_another_model_is_refused_by_name(pools: Pools, fresh_run: Fresh) -> None:
    run = fresh_run("other_shape")
    pools(2).run(rank_tasks.train_run, run=str(run.path))
    shape = rank_tasks.build_worker_spec(str(run.path)).config.model.config_overrides | {"intermediate_size": 96}
    with pytest.raises(CheckpointError, match=r"mlp.*128.*96"):
        pools(2).run(rank_tasks.train_run, run=str(run.path), changes={"model": {"config_overrides": shape}})


def test_export_gives_the_engines_logits(pools: Pools, fresh_run: Fresh) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = fresh_run("exported")
    changes = {"export": {"at_end": True}, "train": {"precision": "bf16"}}
    pools(2).run(rank_tasks.train_run, run=str(run.path), changes=changes)
    ids = [[5, 17, 300, 42, 8, 111, 7, 64], [400, 3, 3, 9, 250, 31, 77, 1]]
    options: dict[str, Any] = {"run": str(run.path), "checkpoint": str(newest_checkpoint(run)), "changes": changes}
    wanted = pools(2).run(rank_tasks.compute_logits, ids=ids, **options)[0]
    model = AutoModelForCausalLM.from_pretrained(run.export_dir)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        found = model(input_ids=torch.tensor(ids)).logits.float().numpy()
    assert np.array_equal(found, wanted)
    assert AutoTokenizer.from_pretrained(run.export_dir).eos_token == "<|endoftext|>"


@pytest.mark.parametrize("zero", [2, 3])
def test_training_from_an_exported_directory_starts_at_its_loss(pools: Pools, fresh_run: Fresh, zero: int) -> None:
    first, second = fresh_run("pretrained"), fresh_run("tuned")
    pools(2).run(rank_tasks.train_run, run=str(first.path), changes={"export": {"at_end": True}})
    changes = {
        "engine": {"zero_stage": zero},
        "model": {"path": str(first.export_dir), "config_overrides": {}},
        "tokenizer": {"path": str(first.export_dir), "train": None},
    }
    pools(2).run(rank_tasks.train_run, run=str(second.path), changes=changes)
    assert read_losses(second)[1] < read_losses(first)[1] - 0.3
