"""Plan of a run: every number and every problem that follows from its configuration. Pure.

`Plan.horizon` holds the part that depends on the prepared data as well: `Plan.with_data` makes it anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from llm_training_toolkit import families
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.section import parse_duration_seconds
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.plan import auto, batch, compilation
from llm_training_toolkit.plan.checks import run_check
from llm_training_toolkit.plan.checks.hierarchy_check import find_hierarchy_problems
from llm_training_toolkit.plan.checks.notes import collect_notes
from llm_training_toolkit.plan.checks.sequence_check import find_sequence_problems
from llm_training_toolkit.plan.checks.tensor_check import find_tensor_problems
from llm_training_toolkit.plan.deepspeed import build_base_config, build_deepspeed_config, find_deepspeed_problems
from llm_training_toolkit.plan.horizon import DataFacts, Horizon, compute_horizon
from llm_training_toolkit.plan.lr_schedule import LRSchedule, ScheduleKind, choose_learning_rate
from llm_training_toolkit.plan.memory import memory_estimate
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing, get_attention_memory
from llm_training_toolkit.plan.memory.host_memory import estimate_peak_host_bytes
from llm_training_toolkit.plan.problem import Problem

_NOT_IN_JSON = {"config", "horizon", "config_problems", "config_estimates"}  # shown in parts, or in resolved.json


@dataclass(frozen=True)
class Plan:
    """Plan of a run. Memory in 10^9 bytes, learning rates absolute, lengths in optimizer steps."""

    config: Config
    """Configuration that the plan follows from."""
    horizon: Horizon
    """Length and mixture, as far as the data is known."""
    name: str
    """Name of the run."""
    model: str
    """Name of the model size."""
    family: str
    """Name of its family, by which a resume knows a size that follows from weights alone."""
    hf_config: Mapping[str, Any]
    parameters: int
    """Parameters of the model without adapters."""
    trainable_parameters: int
    """Parameters of the adapters and of modules trained in full; without adapters all."""
    active_parameters: int
    """Parameters that a token passes through: fewer than all in a mixture of experts."""
    adapter: families.AdapterSpec | None
    """Adapters, or None if the model itself is trained."""
    flops_per_token: int
    precision: str
    zero: int
    activation_checkpointing: ActivationCheckpointing
    compile: bool
    """Whether decoder layers are compiled; False while `auto` is open."""
    compile_reason: str
    """Reason for what `auto` became; empty without `auto` and while it is open."""
    global_batch: int
    micro_batch: int
    workers: int
    """Value of `cluster.workers`, the maximum of an elastic run; 0 = without Ray."""
    fewest_workers: int
    """Minimum of an elastic run, otherwise equal to `workers`."""
    ranks: int
    """Number of devices planned for: those of the (most) workers, or the ranks that were started."""
    sequence_parallel: int
    """Ranks of a replica, which hold slices of the same sequences."""
    tensor_parallel: int
    """Ranks of a replica, which hold slices of the same matrices."""
    sequence_length: int
    tokens_per_step: int
    lr: float
    """Peak learning rate."""
    lr_floor: float
    """Learning rate of the last step."""
    schedule_kind: ScheduleKind
    save_every_steps: int | None
    save_every_seconds: float | None
    eval_every: int
    deepspeed: Mapping[str, Any]
    memory_gb_per_device: Mapping[str, float]
    """Memory with the fewest workers, where it is highest per device."""
    host_memory_gb_per_worker: float
    """Host memory beside the device's, with the fewest workers: a checkpoint's copy and an offload, or loading."""
    config_problems: tuple[Problem, ...]
    """Problems of the configuration by itself."""
    config_estimates: tuple[str, ...]
    """Names of the inexact values that do not depend on the data."""
    notes: tuple[str, ...]

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that work on the same sequences."""
        return self.sequence_parallel * self.tensor_parallel

    @property
    def replicas(self) -> int:
        """Number of replicas, among which a batch is divided; at least 1 where the ranks make no whole one."""
        return self.count_replicas(self.ranks)

    @property
    def steps(self) -> int | None:
        """Length of the run, or None while it depends on unprepared data."""
        return self.horizon.steps

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Every reason that keeps the run from starting."""
        return (*self.config_problems, *self.horizon.problems)

    @property
    def estimated(self) -> tuple[str, ...]:
        """Names of the plan's values that are not exact."""
        return (*(("steps",) if self.horizon.steps_estimated else ()), *self.config_estimates)

    @property
    def is_elastic(self) -> bool:
        """True if the number of workers may change during the run."""
        return self.fewest_workers < self.workers

    def count_replicas(self, ranks: int) -> int:
        """Return the number of replicas of so many ranks."""
        return batch.count_replicas(ranks, self.ranks_per_replica)

    def split_batch(self, replicas: int | None = None) -> tuple[int, ...]:
        """Return the sequences per step of each replica. Raises PlanError if one would have none."""
        return batch.split_global_batch(self.global_batch, replicas or self.replicas)

    def get_accumulation_steps(self, replicas: int | None = None) -> int:
        """Return the micro-batches per step on every replica."""
        return batch.compute_accumulation_steps(self.global_batch, replicas or self.replicas, self.micro_batch)

    def with_data(self, data_facts: DataFacts | None) -> Plan:
        """Return the plan with the horizon that follows from this data; None if nothing is known of it."""
        return replace(self, horizon=compute_horizon(self.config, data_facts, self.hf_config["vocab_size"]))

    def with_ranks(self, ranks: int) -> Plan:
        """Return the plan of an elastic run at another size; memory stays that with the fewest workers."""
        assumed = auto.with_assumed_values(self.config)
        return replace(self, ranks=ranks, deepspeed=_choose_deepspeed_config(assumed, self.trainable_parameters, ranks))

    def with_problem(self, problem: Problem) -> Plan:
        """Return the plan with one more problem."""
        return replace(self, config_problems=(*self.config_problems, problem))

    def with_notes(self, notes: Sequence[str]) -> Plan:
        """Return the plan with more notes, before its own."""
        return replace(self, notes=(*notes, *self.notes))

    def with_compilation(self, chosen: auto.ResolvedValue) -> Plan:
        """Return the plan with `model.compile` resolved."""
        inexact = tuple(name for name in self.config_estimates if name != "compile")
        resolved = replace(self, compile=chosen.value == "true", compile_reason=chosen.reason, config_estimates=inexact)
        return resolved.with_notes([str(chosen)])

    def build_lr_schedule(self) -> LRSchedule:
        """Return the learning rate schedule. Raises PlanError while the length of the run is not known."""
        steps, warmup, decay = self.horizon.steps, self.horizon.warmup_steps, self.horizon.decay_steps
        if steps is None or warmup is None or decay is None:
            raise PlanError("train.epochs: the number of steps is not known before the data is prepared: ltt prepare")
        return LRSchedule(self.schedule_kind, self.lr, steps, warmup, decay, floor=self.lr_floor)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON; `accumulation` maps worker counts (1 to 8 and the run's own) to micro-batches."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _NOT_IN_JSON}
        own = range(self.fewest_workers or 1, self.ranks + 1)
        each = self.ranks_per_replica
        worlds = sorted({*range(1, 9), *own, self.ranks} & set(range(each, each * self.global_batch + 1, each)))
        return {
            **values,
            **self.horizon.to_json(),
            "replicas": self.replicas,
            "hf_config": dict(self.hf_config),
            "deepspeed": dict(self.deepspeed),
            "adapter": _adapter_to_json(self.adapter),
            "memory_gb_per_device": dict(self.memory_gb_per_device),
            "accumulation": {str(world): self.get_accumulation_steps(world // each) for world in worlds},
            "problems": [asdict(problem) for problem in self.problems],
            "estimated": list(self.estimated),
            "notes": list(self.notes),
        }


def make_plan(config: Config, ranks: int | None = None) -> Plan:
    """Plan a run and collect all problems; `ranks` = those that were started, else the most workers.

    `Plan.with_data` adds the facts about its data. Raises PlanError only if nothing can be planned: an unknown size or
    an impossible shape.
    """
    size = families.find_run_size(config)
    hf = families.resolve_hf_config(config)
    total = families.count_parameters(hf)
    adapter = families.resolve_adapter(config, hf)
    trained = adapter.trainable_parameters if adapter else total
    # Without Ray the number of ranks is open: one replica.
    world = ranks or config.cluster.max_workers or config.engine.ranks_per_replica
    smallest = ranks or config.cluster.min_workers or config.engine.ranks_per_replica
    given, config = config, auto.with_assumed_values(config)
    lr = choose_learning_rate(config, total)
    length, every = config.data.sequence_length, config.checkpoint.interval
    # An elastic run has its second partition (zero_hpz_partition_size) at some sizes alone: memory is of the fewest.
    workload = _build_workload(config, hf, adapter, smallest, _choose_deepspeed_config(config, trained, smallest))
    memory_gb = memory_estimate.estimate_memory(workload).to_gigabytes()
    uncompiled = compilation.find_automatic_reason(config, hf) if config.model.compile == "auto" else None
    return Plan(
        config=given,
        horizon=compute_horizon(given, None, hf["vocab_size"]),
        name=config.run.name,
        model=config.model.name,
        family=size.family.name,
        hf_config=hf,
        parameters=total,
        trainable_parameters=trained,
        active_parameters=families.read_model_dims(hf).active_parameters,
        adapter=adapter,
        flops_per_token=families.compute_flops_per_token(hf, length, adapter),
        precision=str(config.train.precision),
        zero=workload.zero,
        activation_checkpointing=workload.checkpointing,
        compile=config.model.compile is True,
        compile_reason=uncompiled or "",
        global_batch=config.train.global_batch_size,
        micro_batch=batch.get_micro_batch(config),
        workers=config.cluster.max_workers,
        fewest_workers=config.cluster.min_workers,
        ranks=world,
        sequence_parallel=config.engine.sequence_parallel,
        tensor_parallel=config.engine.tensor_parallel,
        sequence_length=length,
        tokens_per_step=config.train.global_batch_size * length,
        lr=lr,
        lr_floor=lr if config.optim.lr_scheduler == "constant" else lr * config.optim.min_lr_ratio,
        schedule_kind=config.optim.lr_scheduler,
        save_every_steps=every if isinstance(every, int) else None,
        save_every_seconds=parse_duration_seconds(every) if isinstance(every, str) else None,
        eval_every=config.eval.interval,
        deepspeed=_choose_deepspeed_config(config, trained, world),
        memory_gb_per_device=memory_gb,
        host_memory_gb_per_worker=estimate_peak_host_bytes(workload) / 1e9,
        config_problems=(
            *run_check.find_problems(config, size, hf, world),
            *find_hierarchy_problems(config, ranks),
            *find_sequence_problems(given, size, hf, (smallest, world)),
            *find_tensor_problems(given, size, hf, (smallest, world)),
            *run_check.find_memory_problems(memory_gb),
        ),
        config_estimates=_list_estimated_values(given, compile_open=given.model.compile == "auto" and not uncompiled),
        notes=collect_notes(config, size, hf, (smallest, world)),
    )


def check_plan(plan: Plan) -> Plan:
    """Return the plan, or raise PlanError with all its problems."""
    if plan.problems:
        raise PlanError.from_problems("\n".join(str(problem) for problem in plan.problems), plan.problems)
    return plan


def _list_estimated_values(config: Config, *, compile_open: bool) -> tuple[str, ...]:
    """Return the names of inexact values; an `auto` micro-batch is planned as 1, checkpointing as none."""
    return (
        *((families.ASSUMED_DIMENSIONS,) if families.are_dimensions_assumed(config) else ()),
        *(("precision",) if config.train.precision == "auto" else ()),
        *(("zero",) if config.engine.zero_stage == "auto" else ()),
        *(("activation_checkpointing",) if config.model.activation_checkpointing == "auto" else ()),
        *(("compile",) if compile_open else ()),
        *(("micro_batch", "accumulation") if config.train.micro_batch_size == "auto" else ()),
        "memory_gb_per_device",
    )


def _choose_deepspeed_config(config: Config, parameters: int, workers: int) -> dict[str, Any]:
    """Return the merged configuration, or the toolkit's own if `engine.deepspeed` cannot be merged."""
    make = build_base_config if find_deepspeed_problems(config.engine.deepspeed) else build_deepspeed_config
    return make(config, parameters=parameters, workers=workers)


def _adapter_to_json(adapter: families.AdapterSpec | None) -> dict[str, Any] | None:
    if adapter is None:
        return None
    return {key: value for key, value in asdict(adapter).items() if key != "layers"}


def plan_workload(config: Config, ranks: int) -> memory_estimate.DeviceWorkload:
    """Return what a device's memory depends on, with `auto` planned as by `make_plan`."""
    config = auto.with_assumed_values(config)
    hf = families.resolve_hf_config(config)
    adapter = families.resolve_adapter(config, hf)
    trained = adapter.trainable_parameters if adapter else families.count_parameters(hf)
    return _build_workload(config, hf, adapter, ranks, _choose_deepspeed_config(config, trained, ranks))


def _build_workload(
    config: Config,
    hf: Mapping[str, Any],
    adapter: families.AdapterSpec | None,
    ranks: int,
    deepspeed: Mapping[str, Any],
) -> memory_estimate.DeviceWorkload:
    checkpointing = config.model.activation_checkpointing
    assert checkpointing != "auto", "a plan assumes a value"
    parts = config.engine.tensor_parallel
    return memory_estimate.DeviceWorkload(
        model=families.read_model_dims(hf).slice_matrices(parts),
        adapter=adapter,
        zero=int(config.engine.zero_stage),
        precision="bf16" if config.train.precision == "bf16" else "fp32",
        workers=max(ranks // parts, 1),
        sequence_parallel=config.engine.sequence_parallel,
        micro_batch=batch.get_micro_batch(config),
        sequence_length=config.data.sequence_length,
        checkpointing=checkpointing,
        loss_chunk=batch.compute_loss_chunk_size(config.model.loss_chunk_size, hf["vocab_size"]),
        attention=get_attention_memory(config.model.attn_implementation),
        offload=config.engine.offload,
        **memory_estimate.read_deepspeed_limits(deepspeed),
    )
