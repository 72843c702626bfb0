"""Tasks of the pool's ranks for tests: build engines, take steps, run the worker on a run directory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from checkpoints import build_manifest, save
from llm_training_toolkit.checkpoint import CheckpointReader
from llm_training_toolkit.checkpoint.restore import restore_engine
from llm_training_toolkit.config import parse_config
from llm_training_toolkit.data.collate import MicroBatch, build_full_batch
from llm_training_toolkit.data.dataloader import DataLoader
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.data.prepare.epochs import build_data_facts
from llm_training_toolkit.distributed.context import RunContext, StopRequest
from llm_training_toolkit.distributed.events import Event, NoteEvent, StepEvent, WarningEvent
from llm_training_toolkit.distributed.flight_recorder import set_flight_record_directory, write_flight_record
from llm_training_toolkit.engine import Engine, gathered_parameter, zero3_init
from llm_training_toolkit.errors import ToolkitError
from llm_training_toolkit.evaluation.validation import compute_eval_loss
from llm_training_toolkit.models import LossModule, build_model, check_pretrained_weights, resize_embeddings
from llm_training_toolkit.models.attention import compute_cu_seqlens
from llm_training_toolkit.models.build import DTYPES
from llm_training_toolkit.models.init_weights import build_generator
from llm_training_toolkit.plan import Plan, compute_replica_slice, make_plan
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.worker.build import build_run_model
from llm_training_toolkit.worker.hub_download import ensure_local_weights
from llm_training_toolkit.worker.main import run_worker
from llm_training_toolkit.worker.spec import WorkerSpec
from run_results import newest_checkpoint
from synchronizations import SynchronizationCounter

Arrays = dict[str, np.ndarray[Any, Any]]


def build_context(report: Any = None, stop_request: Any = None) -> RunContext:
    """Build the context of this rank of the pool."""
    options: dict[str, Any] = {}
    if report is not None:
        options["event_listener"] = report
    if stop_request is not None:
        options["stop_request_reader"] = stop_request
    return RunContext(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), **options)


def build_single_rank_context() -> RunContext:
    """Build the context of a single process."""
    return RunContext(0, 1, torch.device("cpu"))


def build_worker_spec(run: str, changes: Mapping[str, Any] | None = None) -> WorkerSpec:
    """Build the spec of a run directory, its configuration changed section by section."""
    directory = RunDirectory(Path(run))
    data = json.loads(directory.resolved_config_path.read_text())
    for section, values in (changes or {}).items():
        data[section] = (data[section] or {}) | values
    config = parse_config(data, "test")
    return WorkerSpec(directory, config, DatasetInfo.from_json(directory.dataset_info_path.read_text()))


def build_engine(spec: WorkerSpec, plan: Plan) -> Engine:
    """Build an engine with the run's initial weights."""
    return build_run_model(spec, plan, build_context(), None).engine


def catch_build_error(run: str, changes: Mapping[str, Any]) -> str:
    """The error with which an engine is refused."""
    spec = build_worker_spec(run, changes)
    try:
        build_engine(spec, build_plan(spec)).close()
    except ToolkitError as error:
        return str(error)
    return ""


def build_plan(spec: WorkerSpec) -> Plan:
    """Make the plan of a run for this pool's number of ranks."""
    return make_plan(spec.config, ranks=dist.get_world_size()).with_data(build_data_facts(spec.dataset_info))


def compute_own_slice(plan: Plan) -> range:
    """Return the positions of this rank's replica in a whole global batch."""
    each = plan.ranks_per_replica
    return compute_replica_slice(plan.global_batch, dist.get_world_size() // each, dist.get_rank() // each)


def draw_adapter_weights(name: str, shape: Any) -> torch.Tensor:
    """Draw weights of trained adapters, a pure function of the name."""
    return torch.empty(tuple(shape)).normal_(0.0, 0.05, generator=build_generator(7, name))


def perturb_weights(engine: Engine) -> None:
    """Replace the adapters' weights: beside a zero factor, the other factor of an adapter has no gradient."""
    for piece in engine.local_fragments():
        whole = draw_adapter_weights(piece.name, engine.shapes[piece.name]).flatten()
        piece.get_weights().copy_(whole[piece.start : piece.start + piece.count])
    engine.sync_low_precision()


def compute_gradients(
    run: str,
    changes: Mapping[str, Any],
    micro_batch: int,
    step: int = 0,
    *,
    perturbed: bool = False,
    trial_pass: bool = False,
) -> tuple[float, float, Arrays]:
    """Loss, gradient norm and whole fp32 gradients of one global batch, split over this pool's ranks."""
    from deepspeed.utils import safe_get_full_grad

    spec = build_worker_spec(run, changes)
    plan = build_plan(spec)
    engine = build_engine(spec, plan)
    if perturbed:
        perturb_weights(engine)
    dataloader = DataLoader(spec.dataset_info, global_batch=plan.global_batch, epochs=None)
    count = -(-len(compute_replica_slice(plan.global_batch, plan.replicas, 0)) // micro_batch)
    batches = dataloader.get_micro_batches(step, compute_own_slice(plan), micro_batch, count)
    if trial_pass:
        engine.run_trial_pass(build_full_batch(batches[0]))
    loss_sum = engine.forward_backward(batches, dataloader.count_loss_tokens(step))
    [total] = build_context().all_reduce_sum(loss_sum)
    found = {}
    for name, parameter in engine.deepspeed.module.named_parameters():
        if not parameter.requires_grad:
            continue
        own = engine.get_full_gradient(parameter)
        found[name] = (safe_get_full_grad(parameter) if own is None else own).float().numpy().copy()
    norm = engine.optim_step(0.0)
    engine.close()
    return total / dataloader.count_loss_tokens(step), norm, found


def list_fragments(run: str, changes: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, int, int]]]:
    """Size of every parameter, and the pieces this rank saves; reads and writes each of them on the way."""
    spec = build_worker_spec(run, changes)
    engine = build_engine(spec, build_plan(spec))
    for piece in engine.local_fragments():
        for tensor in piece.get_tensors(engine.optimizer).values():
            assert tensor.shape == (piece.count,)
            assert tensor.dtype == torch.float32
            tensor.copy_(tensor.clone())
    engine.sync_low_precision()
    table = [(piece.name, piece.start, piece.count) for piece in engine.owned_fragments()]
    sizes = {name: int(np.prod(shape)) for name, shape in engine.shapes.items()}
    engine.close()
    return sizes, table


def gather_state(engine: Engine, directory: str) -> Arrays:
    """Every weight and moment, gathered by writing and reading a checkpoint of the engine."""
    shapes = engine.shapes

    parts = engine.column_parts
    manifest = build_manifest(0, shapes, world_size=dist.get_world_size(), zero=engine.stage, column_parts=parts)
    save(build_context(), Path(directory), engine.owned_fragments(), engine.optimizer, manifest)
    return read_state(Path(directory))


def read_state(directory: Path) -> Arrays:
    """Every weight and moment in a checkpoint."""
    checkpoint = CheckpointReader(directory)
    return {
        f"{name}/{key}": checkpoint.read(name, key, 0, int(np.prod(shape)))
        for name, shape in checkpoint.manifest.shapes.items()
        for key in ("weights", "exp_avg", "exp_avg_sq")
    }


def read_final_state(run: RunDirectory) -> Arrays:
    """Every weight and moment in the newest checkpoint of a run."""
    return read_state(newest_checkpoint(run))


def take_first_update(run: str, changes: Mapping[str, Any], directory: str) -> Arrays:
    """The state after one update from the first weights."""
    spec = build_worker_spec(run, changes)
    plan = build_plan(spec)
    engine = build_engine(spec, plan)
    dataloader = DataLoader(spec.dataset_info, global_batch=plan.global_batch, epochs=None)
    batches = dataloader.get_micro_batches(0, compute_own_slice(plan), plan.micro_batch, plan.get_accumulation_steps())
    engine.forward_backward(batches, dataloader.count_loss_tokens(0))
    engine.optim_step(1e-3)
    state = gather_state(engine, directory)
    engine.close()
    return state


def load_checkpoint(
    run: str, changes: Mapping[str, Any], checkpoint: str, directory: str
) -> tuple[Arrays, set[str], set[float]]:
    """The state right after loading a checkpoint, the groups' weight decays, and the step counters of the flats."""
    spec = build_worker_spec(run, changes)
    engine = build_engine(spec, build_plan(spec))
    restore_engine(engine, CheckpointReader(Path(checkpoint)))
    state = gather_state(engine, directory)
    decays = {str(group["weight_decay"]) for group in engine.optimizer.param_groups}
    counters = {float(engine.optimizer.state[piece.flat]["step"]) for piece in engine.local_fragments()}
    engine.close()
    return state, decays, counters


def train_run(run: str, changes: Mapping[str, Any] | None = None, stop_after: int | None = None) -> dict[str, Any]:
    """Train a run as its worker does; `stop_after` requests a stop once that many steps are complete."""
    completed = [0]
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepEvent):
            completed[0] = event.step

    def stop_request() -> StopRequest:
        return StopRequest.STOP if stop_after is not None and completed[0] >= stop_after - 1 else StopRequest.NONE

    result = run_worker(build_worker_spec(run, changes), build_context(report, stop_request))
    return {**result, "events": events}


def train_until_message(run: str, changes: Mapping[str, Any], message: str, seconds: float) -> dict[str, Any]:
    """Train a run; once rank 0 has reported `message`, it sleeps `seconds` and a stop is requested."""
    stop = [False]

    def report(event: Event) -> None:
        if isinstance(event, NoteEvent | WarningEvent) and message in event.message:
            time.sleep(seconds)
            stop[0] = True

    return run_worker(
        build_worker_spec(run, changes),
        build_context(report, lambda: StopRequest.STOP if stop[0] else StopRequest.NONE),
    )


def train_with_late_data(
    runs: list[str], arrivals: Mapping[str, Mapping[int, str]], stop_at: int | None = None
) -> dict[str, Any]:
    """Train a run, each rank on a directory of its own, while the rest of its data arrives.

    `arrivals` has the text of each file of the data directory by rank. Rank 0 writes them while it waits, those of
    rank r at its read number 2r + 1 of the stop request: one poll then finds them at the ranks before r, but not at r.
    `stop_at` is the number of the read that requests a stop.
    """
    waiting, reads = [False], [0]

    def report(event: Event) -> None:
        waiting[0] |= isinstance(event, NoteEvent) and "waits for data of the next epoch" in event.message

    def stop_request() -> StopRequest:
        if waiting[0]:
            reads[0] += 1
            for name, by_rank in arrivals.items():
                for rank, text in by_rank.items():
                    if reads[0] == 2 * rank + 1:
                        write_atomically(Path(runs[rank], "data", name), text)
        return StopRequest.STOP if reads[0] == stop_at else StopRequest.NONE

    return run_worker(build_worker_spec(runs[dist.get_rank()]), build_context(report, stop_request))


def train_on_corrupt_data(
    run: str, corrupt_steps: Sequence[int], changes: Mapping[str, Any] | None = None, stop_after: int | None = None
) -> dict[str, Any]:
    """Train a run in which the tokens of some steps (counted from 0) are random, as damaged storage returns them."""
    whole = DataLoader.get_micro_batches

    def batch(dataloader: DataLoader, step: int, positions: range, micro_batch: int, count: int) -> list[MicroBatch]:
        found = whole(dataloader, step, positions, micro_batch, count)
        if step not in corrupt_steps:
            return found
        draw = torch.Generator().manual_seed(step)
        drawn_ids = [torch.randint(5, 500, each.input_ids.shape, generator=draw) for each in found]
        labels = [
            torch.where(each.labels >= 0, ids.roll(-1, 1), -100) for each, ids in zip(found, drawn_ids, strict=True)
        ]
        return [
            replace(each, input_ids=ids, labels=label)
            for each, ids, label in zip(found, drawn_ids, labels, strict=True)
        ]

    DataLoader.get_micro_batches = batch  # type: ignore[method-assign, assignment]
    try:
        return train_run(run, changes, stop_after)
    finally:
        DataLoader.get_micro_batches = whole  # type: ignore[method-assign]


def train_to_rung(
    run: str, rungs: tuple[int, ...], stop_at: int, stop_request: StopRequest = StopRequest.NONE
) -> tuple[dict[str, Any], list[int]]:
    """Train a trial that is stopped at a rung; return its result and the rungs at which rank 0 asked.

    `stop_request` is a user's request, read after every step.
    """
    asked: list[int] = []

    def ask(step: int) -> StopRequest:
        asked.append(step)
        return StopRequest.STOP if step == stop_at else StopRequest.NONE

    return run_worker(
        build_worker_spec(run), replace(build_context(stop_request=lambda: stop_request), rungs=rungs, rung_waiter=ask)
    ), asked


def load_base_weights(hf_config: Mapping[str, Any], path: str, zero: int, rows: int | None = None) -> Arrays:
    """The weights at `path`, loaded as a worker does under a ZeRO stage, with as many rows of the vocabulary."""
    check_pretrained_weights(path, hf_config["model_type"])
    with zero3_init({"zero_optimization": {"stage": zero}, "train_micro_batch_size_per_gpu": 1}):
        model = build_model(hf_config, precision="fp32", attention="sdpa", path=path)
        if rows is not None:
            resize_embeddings(model, rows, gathered_parameter)
    found = {}
    for name, parameter in model.named_parameters():
        with gathered_parameter(parameter):
            found[name] = parameter.detach().numpy().copy()
    return found


def evaluate_packed_documents(run: str, model: dict[str, Any], attention: str) -> dict[str, Any]:
    """Losses by the evaluation of the documents of one packed held-out row, each of them changed once.

    loss (documents,) of each, `changed` (documents, documents): the same after one (the row) was changed, and
    `same_logits` (documents, documents): whether its logits stayed as they were. `leaking` is `changed` with positions
    that do not begin anew, so that documents see each other.
    """
    spec = build_worker_spec(run, {"train": {"precision": "fp32"}})
    plan = build_plan(spec)
    torch.manual_seed(0)
    built = build_model(model, precision="fp32", attention=attention)
    engine = Engine(LossModule(built, 16), spec.config.optim, plan.deepspeed, torch.device("cpu"), zero_stage=plan.zero)
    dataloader = DataLoader(spec.dataset_info, global_batch=plan.global_batch, epochs=None)
    [batch] = dataloader.get_eval_batches(0, 1, 1000)
    row, documents = _fullest_row(batch)

    def losses(ids: torch.Tensor, positions: torch.Tensor) -> list[float]:
        found = []
        for document in documents:
            labels = torch.full_like(batch.labels, -100)
            labels[row, document] = batch.labels[row, document]
            found.append(compute_eval_loss(engine, [build_batch(ids, positions, labels)], 1, 1, build_context()).loss)
        return found

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            whole: torch.Tensor = engine.deepspeed.module.compute_logits(ids, batch.position_ids)
        return whole[row]

    through = torch.arange(batch.input_ids.shape[1]).expand_as(batch.position_ids)
    loss, before = losses(batch.input_ids, batch.position_ids), logits(batch.input_ids)
    changed, same_logits, leaking = [], [], []
    for document in documents:
        ids = batch.input_ids.clone()
        ids[row, document] = (ids[row, document] + 100) % 512
        after = logits(ids)
        changed.append(losses(ids, batch.position_ids))
        leaking.append(losses(ids, through))
        same_logits.append([torch.equal(before[each], after[each]) for each in documents])
    assert not engine.deepspeed.module.training
    engine.close()
    return {"loss": loss, "changed": changed, "same_logits": same_logits, "leaking": leaking}


def build_batch(ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> MicroBatch:
    """A micro-batch with the bounds of its documents."""
    return MicroBatch(ids, positions, labels, *compute_cu_seqlens(positions))


def _fullest_row(batch: MicroBatch) -> tuple[int, list[slice]]:
    """The row with most documents, and where each of them lies; padding is a piece that bears no loss."""
    found = []
    for positions, labels in zip(batch.position_ids, batch.labels, strict=True):
        bounds = [*torch.nonzero(positions == 0).flatten().tolist(), len(positions)]
        pieces = [slice(*each) for each in pairwise(bounds)]
        found.append([piece for piece in pieces if (labels[piece] >= 0).any()])
    row = max(range(len(found)), key=lambda each: len(found[each]))
    return row, found[row]


def compute_logits(
    run: str, checkpoint: str, ids: list[list[int]], changes: Mapping[str, Any] | None = None
) -> np.ndarray[Any, Any]:
    """The engine's own logits after loading a checkpoint."""
    spec = build_worker_spec(run, changes)
    engine = build_engine(spec, build_plan(spec))
    restore_engine(engine, CheckpointReader(Path(checkpoint)))
    tokens = torch.tensor(ids)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    engine.deepspeed.eval()
    with torch.no_grad():
        logits = engine.deepspeed.module.compute_logits(tokens, positions)
    engine.close()
    return np.asarray(logits.float().numpy())


def compute_exported_logits(directory: str, precision: str, ids: list[list[int]]) -> dict[str, Any]:
    """The logits of an exported directory as plain transformers and peft load it, its class, and what did not fit."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapters, dtype = Path(directory, "adapter_config.json"), DTYPES[precision]
    base = json.loads(adapters.read_text())["base_model_name_or_path"] if adapters.is_file() else directory
    model, info = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, output_loading_info=True)
    architecture = type(model).__name__
    if adapters.is_file():
        model = PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(ids), use_cache=False).logits.float().numpy()
    return {"logits": logits, "architecture": architecture, "info": info}


def download_weights(run: str, path: str, endpoint: str, nodes: Sequence[str], homes: Sequence[str]) -> str:
    """Directory of a hub id's weights for this rank: `nodes` and folders of the hub's client are by rank."""
    from huggingface_hub import constants

    rank, kept = dist.get_rank(), {}
    changed = {"ENDPOINT": endpoint, "HF_HUB_CACHE": homes[rank]}
    changed["HUGGINGFACE_CO_URL_TEMPLATE"] = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in changed.items():
        kept[name] = getattr(constants, name)
        setattr(constants, name, value)
    try:
        return ensure_local_weights(path, replace(build_worker_spec(run), node=nodes[rank]), build_context())
    finally:
        for name, value in kept.items():
            setattr(constants, name, value)


def record_collectives(directory: str, variables: Mapping[str, str]) -> None:
    """Sum once over the ranks, then write this rank's flight record."""
    before = dict(os.environ)
    os.environ.pop("TORCH_FR_DUMP_TEMP_FILE", None)  # of a run that these ranks have worked on
    os.environ.update(variables)
    try:
        set_flight_record_directory(Path(directory))
        build_context().all_reduce_sum(1.0)
        write_flight_record(dist.get_rank())
    finally:
        os.environ.clear()
        os.environ.update(before)


def count_synchronizations(run: str, changes: Mapping[str, Any]) -> dict[str, int]:
    """Reads of the device's values by the host: in two micro-batches, in four, and in the update."""
    spec = build_worker_spec(run, changes)
    engine = build_engine(spec, build_plan(spec))
    dataloader = DataLoader(spec.dataset_info, global_batch=spec.config.train.global_batch_size, epochs=None)
    batches = dataloader.get_micro_batches(0, range(4), 1, 4)
    engine.forward_backward(batches, 100)
    engine.optim_step(1e-3)
    counts = {}
    work: dict[str, Callable[[], float]] = {
        "two": lambda: engine.forward_backward(batches[:2], 100),
        "update": lambda: engine.optim_step(1e-3),
        "four": lambda: engine.forward_backward(batches, 100),
    }
    for part, run_part in work.items():
        with SynchronizationCounter() as counter:
            run_part()
        counts[part] = counter.count
    engine.close()
    return counts
