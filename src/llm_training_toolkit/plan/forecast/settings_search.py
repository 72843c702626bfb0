"""Search over the settings that change speed and memory alone, on the hardware of a cluster file (`ltt plan --search`).

These are the number of workers, those that share rows or matrices, ZeRO stage, offload, activation checkpointing and
micro-batch. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

from llm_training_toolkit.config.schema import Config, Offload
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.plan.auto import with_activation_checkpointing
from llm_training_toolkit.plan.forecast.cluster_estimate import (
    ClusterEstimate,
    compute_max_workers,
    estimate_on_cluster,
    get_worker_memory_gb,
    with_faster_precision,
)
from llm_training_toolkit.plan.forecast.hardware import ClusterHardware
from llm_training_toolkit.plan.memory.memory_settings import (
    MEMORY_FILL,
    MemorySettings,
    list_memory_settings,
    with_micro_batch,
)
from llm_training_toolkit.plan.plan import Plan, make_plan, plan_workload

# Order of the values in an override line.
SEARCHED_KEYS = (
    "cluster.workers",
    "engine.zero_stage",
    "engine.offload",
    "model.activation_checkpointing",
    "train.micro_batch_size",
)


# Step times closer than this are equal: the estimate's median error is 12 % (docs/performance.md). The plainer settings
# win then, as for `auto`: replicas of one worker, no offload, less recomputation, then stages that exchange gradients
# once a step.
_SAME_SPEED = 1.05
_REPLICA_SIZES = (2, 4, 8)  # as many as nodes have devices; a run that asks for another size keeps it


class ReplicaShape(NamedTuple):
    """Workers of a replica: those that share rows and those that share matrices; one of the two is 1."""

    sequence_parallel: int
    tensor_parallel: int

    @property
    def overrides(self) -> tuple[str, ...]:
        """Return the arguments that set it; none for replicas of one worker."""
        return tuple(f"engine.{name}={each}" for name, each in self._asdict().items() if each > 1)

    def format(self) -> str:
        """Format as `1`, `4 by rows` or `4 by matrices`."""
        if self.tensor_parallel > 1:
            return f"{self.tensor_parallel} by matrices"
        return f"{self.sequence_parallel} by rows" if self.sequence_parallel > 1 else "1"


@dataclass(frozen=True)
class SearchCandidate:
    """Combination that fits, with its estimate."""

    workers: int
    replica: ReplicaShape
    offload: Offload
    settings: MemorySettings
    memory_gb: float
    """Estimated peak of a device, in 10^9 bytes."""
    host_gb_per_node: float
    """Host memory beside the devices' that a node of its workers takes, in 10^9 bytes; cluster files state none."""
    estimate: ClusterEstimate

    @property
    def overrides(self) -> tuple[str, ...]:
        """Return the arguments for `ltt plan` and `ltt train` that set it."""
        kept = self.settings
        values = (self.workers, kept.zero, self.offload, kept.checkpointing, kept.micro_batch)
        workers, *others = (f"{key}={value}" for key, value in zip(SEARCHED_KEYS, values, strict=True))
        return (workers, *self.replica.overrides, *others)

    @property
    def limited_by(self) -> str:
        """Return the largest part of a step's time: `computing`, `sending` or `updating in host memory`."""
        parts = {
            "computing": self.estimate.compute_seconds,
            "sending": self.estimate.communication_seconds,
            "updating in host memory": self.estimate.host_seconds,
        }
        return max(parts, key=lambda part: parts[part])

    @property
    def price_per_step(self) -> float:
        """Return the price of a step in US dollars; on hardware without a price its device-seconds."""
        return self.estimate.step_seconds * (self.estimate.usd_per_hour / 3600 or self.workers)

    def to_json(self) -> dict[str, Any]:
        """Return the candidate as JSON: overrides, hours, US dollars, seconds a step, 10^9 bytes."""
        return {
            "overrides": list(self.overrides),
            "hours": self.estimate.hours,
            "cost": self.estimate.cost_usd,
            "seconds_per_step": self.estimate.step_seconds,
            "memory_gb_per_device": self.memory_gb,
            "host_memory_gb_per_node": self.host_gb_per_node,
            "limited_by": self.limited_by,
        }


@dataclass(frozen=True)
class SettingsSearch:
    """Result of a search: the fastest combination for each number of workers, the plainest among equally fast ones."""

    tried: int
    fitting: int
    by_workers: tuple[SearchCandidate, ...]

    @property
    def fastest(self) -> SearchCandidate | None:
        """Return the candidate with the shortest step; of equal ones that with the fewest workers."""
        return min(self.by_workers, key=lambda each: each.estimate.step_seconds, default=None)

    @property
    def cheapest(self) -> SearchCandidate | None:
        """Return the candidate with the lowest price per step; of equal ones that with the fewest workers."""
        return min(self.by_workers, key=lambda each: each.price_per_step, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the search as JSON."""
        return {
            "tried": self.tried,
            "fitting": self.fitting,
            "fastest": None if self.fastest is None else self.fastest.to_json(),
            "cheapest": None if self.cheapest is None else self.cheapest.to_json(),
            "by_workers": [each.to_json() for each in self.by_workers],
        }


def search_settings(config: Config, plan: Plan, hardware: ClusterHardware) -> SettingsSearch:
    """Try all combinations on a cluster, for a run as long as the given plan.

    Raises PlanError for problems that none of the searched settings can mend.
    """
    others = [problem for problem in plan.problems if problem.where not in SEARCHED_KEYS]
    if others:
        raise PlanError.from_problems("\n".join(str(problem) for problem in others), others)
    config = with_faster_precision(config, hardware)
    tried = fitting = 0
    fastest: list[SearchCandidate] = []
    for workers in list_worker_counts(config, hardware):
        candidates: list[SearchCandidate] = []
        for replica, offload in itertools.product(list_replica_shapes(config, workers), get_args(Offload)):
            opened = _with_open_settings(config, workers, replica, offload)
            if make_plan(opened).problems:  # such as heads that do not divide
                continue
            combinations = list_memory_settings(opened, workers)
            found = _find_fitting(opened, combinations, hardware)
            tried, fitting = tried + len(combinations), fitting + len(found)
            candidates += _estimate_candidates(opened, plan, hardware, found)
        if candidates:
            limit = _SAME_SPEED * min(each.estimate.step_seconds for each in candidates)
            fastest.append(next(each for each in candidates if each.estimate.step_seconds <= limit))
    return SettingsSearch(tried, fitting, tuple(fastest))


def list_replica_shapes(config: Config, workers: int) -> list[ReplicaShape]:
    """Return the replicas to try on so many workers, those of one worker first; given ones are kept."""
    given = ReplicaShape(config.engine.sequence_parallel, config.engine.tensor_parallel)
    if given != (1, 1):
        return [given]
    sizes = [each for each in _REPLICA_SIZES if workers % each == 0]
    return [given, *(ReplicaShape(1, each) for each in sizes), *(ReplicaShape(each, 1) for each in sizes)]


def list_worker_counts(config: Config, hardware: ClusterHardware) -> list[int]:
    """Return the numbers of workers to try: doubled replicas on a node, then whole nodes, up to all and to the batch.

    Each is a multiple of a replica's workers; the workers of whole nodes are rounded down to one.
    """
    per_node, each = hardware.get_workers_per_node(config.cluster.cpus_per_worker), config.engine.ranks_per_replica
    largest = each if each > 1 else max(_REPLICA_SIZES)
    most = min(compute_max_workers(config, hardware, per_node), largest * config.train.global_batch_size)
    powers = [2**exponent for exponent in range(most.bit_length())]
    on_one = [each * power for power in powers if each * power < per_node]
    counts = {*on_one, *(per_node * nodes // each * each for nodes in powers), most}
    return sorted(count for count in counts if 0 < count <= most)


def format_search(search: SettingsSearch) -> list[str]:
    """Format the fastest combination for every number of workers as a table, then the fastest and the cheapest."""
    lines = [f"search: {search.fitting:,} of {search.tried:,} combinations fit, by the estimate"]
    if search.fastest is None or search.cheapest is None:
        return [*lines, "Nothing fits: take more or larger devices, a shorter data.sequence_length, or model.lora"]
    rows = [_COLUMNS, *(_format_row(each) for each in search.by_workers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines += ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"fastest   {' '.join(search.fastest.overrides)}")
    lines.append(f"cheapest  {' '.join(search.cheapest.overrides)}")
    return lines


_COLUMNS = (
    *("workers", "replica of", "ZeRO", "offload", "checkpointing", "micro-batch"),
    *("GB", "host GB", "s/step", "time", "1,000 steps", ""),
)


def _format_row(candidate: SearchCandidate) -> tuple[str, ...]:
    kept, estimate = candidate.settings, candidate.estimate
    return (
        str(candidate.workers),
        candidate.replica.format(),
        str(kept.zero),
        candidate.offload,
        kept.checkpointing,
        str(kept.micro_batch),
        f"{candidate.memory_gb:.3g}",
        f"{candidate.host_gb_per_node:.3g}",
        f"{estimate.step_seconds:.3g}",
        "unknown" if estimate.hours is None else f"{estimate.hours:,.3g} h",
        f"${estimate.usd_per_hour / 3.6 * estimate.step_seconds:,.2f}",
        f"limited by {candidate.limited_by}",
    )


def _with_open_settings(config: Config, workers: int, replica: ReplicaShape, offload: Offload) -> Config:
    """Return the configuration with these, and with the other searched settings open."""
    config = with_micro_batch(with_activation_checkpointing(config, "auto"), "auto")
    cluster = config.cluster.model_copy(update={"workers": workers})
    engine = config.engine.model_copy(update={"offload": offload, "zero_stage": "auto", **replica._asdict()})
    return config.model_copy(update={"cluster": cluster, "engine": engine})


def _find_fitting(
    config: Config, combinations: Sequence[MemorySettings], hardware: ClusterHardware
) -> dict[MemorySettings, int]:
    """Return the combinations that fit the devices, with their bytes."""
    load = plan_workload(config, config.cluster.max_workers)
    limit = MEMORY_FILL * 1e9 * get_worker_memory_gb(config, hardware)
    needed = {settings: settings.estimate_bytes(load) for settings in combinations}
    return {settings: size for settings, size in needed.items() if size <= limit}


def _estimate_candidates(
    config: Config, plan: Plan, hardware: ClusterHardware, found: Mapping[MemorySettings, int]
) -> Iterator[SearchCandidate]:
    """Yield candidates in the order of the combinations: for each stage and checkpointing the largest micro-batch.

    Smaller micro-batches of the same settings make more passes and exchanges, and are never faster.
    """
    largest: dict[tuple[int, str], MemorySettings] = {}
    for settings in found:
        kept = largest.setdefault((settings.zero, settings.checkpointing), settings)
        if settings.micro_batch > kept.micro_batch:
            largest[settings.zero, settings.checkpointing] = settings
    for settings in largest.values():
        applied = settings.apply_to_config(config)
        made = replace(make_plan(applied), horizon=plan.horizon)
        estimate = estimate_on_cluster(applied, made, hardware)
        if made.problems or estimate.problems:
            continue
        per_node = -(-made.ranks // estimate.nodes)
        host = 0.0 if hardware.is_cpu else made.host_memory_gb_per_worker * per_node
        replica = ReplicaShape(config.engine.sequence_parallel, config.engine.tensor_parallel)
        memory_gb = found[settings] / 1e9
        yield SearchCandidate(made.workers, replica, config.engine.offload, settings, memory_gb, host, estimate)
