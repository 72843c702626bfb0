"""Estimate of a plan on the hardware of a cluster file: fit, time and cost. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.plan.auto import Precision, with_precision
from llm_training_toolkit.plan.batch import count_replicas
from llm_training_toolkit.plan.forecast.communication import collect_communication_notes
from llm_training_toolkit.plan.forecast.hardware import ClusterHardware
from llm_training_toolkit.plan.forecast.memory_fix import suggest_memory_fix
from llm_training_toolkit.plan.forecast.offload import estimate_host_seconds
from llm_training_toolkit.plan.forecast.step_time import (
    MeasuredSpeed,
    compute_measured_seconds,
    count_updated_parameters,
    estimate_compute_seconds,
    estimate_exchange_seconds,
)
from llm_training_toolkit.plan.forecast.utilisation import CPU_UTILISATION
from llm_training_toolkit.plan.memory.host_memory import compute_checkpoint_copy_bytes, estimate_host_bytes
from llm_training_toolkit.plan.memory.memory_estimate import CUDA_RUNTIME_BYTES
from llm_training_toolkit.plan.memory.memory_settings import MEMORY_FILL, choose_memory_settings, with_micro_batch
from llm_training_toolkit.plan.plan import Plan, plan_workload
from llm_training_toolkit.plan.problem import Problem, format_plural

EXCLUDED_TIME_NOTE = (
    "Time and cost are of the steps alone: starting up, preparing data, evaluation, copies for checkpoints and "
    "restarts come on top."
)


@dataclass(frozen=True)
class ClusterEstimate:
    """Estimate of a run on a cluster."""

    hardware: ClusterHardware
    nodes: int
    """Nodes that the workers occupy; all nodes of the cluster if the workers do not fit."""
    hours: float | None
    """Duration of the run. Unknown (None) while its length is, or if it does not fit."""
    compute_seconds: float
    """Computation per step."""
    utilisation: float
    """Share of the peak that computing reaches, by FLOPs with those of recomputation."""
    measured: bool
    """True if a run measured the time of a step, which contains the communication."""
    overlapped_seconds: float
    """Communication per step beside computation; 0 for one worker."""
    exposed_seconds: float
    """Communication per step while devices wait."""
    host_seconds: float
    """Update per step in host memory, while devices wait; 0 without `engine.offload`."""
    checkpoint_gb: float
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def communication_seconds(self) -> float:
        """All communication per step."""
        return self.overlapped_seconds + self.exposed_seconds

    @property
    def step_seconds(self) -> float:
        """Return the larger of computation and the communication beside it, plus what nothing hides."""
        if self.measured:
            return self.compute_seconds
        return max(self.compute_seconds, self.overlapped_seconds) + self.exposed_seconds + self.host_seconds

    @property
    def usd_per_hour(self) -> float:
        """Price of the occupied nodes and the head."""
        return self.nodes * self.hardware.price_per_hour.node + self.hardware.price_per_hour.head

    @property
    def cost_usd(self) -> float | None:
        """Cost in US dollars, or None like `hours`."""
        return None if self.hours is None else self.hours * self.usd_per_hour

    @property
    def checkpoint_seconds(self) -> float:
        """Time to write a checkpoint to the shared storage."""
        return self.checkpoint_gb / self.hardware.bandwidth_gb_per_s.storage

    def add_to_plan(self, plan: Plan) -> Plan:
        """Return the plan with the problems and notes of this cluster added."""
        return replace(
            plan,
            config_problems=(*plan.config_problems, *self.problems),
            notes=(*plan.notes, *self.notes),
            config_estimates=(*plan.config_estimates, "hours", "cost"),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields that `ltt plan --json` adds for a cluster: hours or seconds, and US dollars."""
        return {
            "hours": self.hours,
            "cost": self.cost_usd,
            "cluster": {
                "nodes": self.nodes,
                "usd_per_hour": self.usd_per_hour,
                "compute_seconds_per_step": self.compute_seconds,
                "utilisation": self.utilisation,
                "communication_seconds_per_step": self.communication_seconds,
                "exposed_communication_seconds_per_step": self.exposed_seconds,
                "host_seconds_per_step": self.host_seconds,
                "seconds_per_step": self.step_seconds,
                "checkpoint_gb": self.checkpoint_gb,
                "checkpoint_seconds": self.checkpoint_seconds,
                "hardware": self.hardware.model_dump(mode="json"),
            },
        }


def resolve_for_hardware(config: Config, hardware: ClusterHardware) -> tuple[Config, tuple[str, ...]]:
    """Replace `auto` by its value on a cluster, with the reasons: the faster precision, the fastest that fits.

    An `auto` micro-batch takes part in the choice and stays `auto`, because it depends on the number of workers.
    """
    ranks = config.cluster.min_workers or config.engine.ranks_per_replica  # memory per device peaks with the fewest
    config = with_faster_precision(config, hardware)
    if count_replicas(ranks, config.engine.ranks_per_replica) > config.train.global_batch_size:
        return config, ()
    choice = choose_memory_settings(config, ranks, 1e9 * get_worker_memory_gb(config, hardware))
    reasons = tuple(str(reason) for reason in choice.reasons if reason.key != "train.micro_batch_size")
    rows = config.train.micro_batch_size
    config = choice.settings.apply_to_config(config)
    return with_micro_batch(config, rows), reasons


def with_faster_precision(config: Config, hardware: ClusterHardware) -> Config:
    """Return the configuration with `train.precision: auto` replaced by the precision with the higher peak there."""
    if config.train.precision != "auto":
        return config
    faster: Precision = "bf16" if hardware.get_peak_flops("bf16") >= hardware.get_peak_flops("fp32") else "fp32"
    return with_precision(config, faster)


def estimate_on_cluster(
    config: Config, plan: Plan, hardware: ClusterHardware, measured: MeasuredSpeed | None = None
) -> ClusterEstimate:
    """Estimate a plan on a cluster, with all problems there; an elastic one with as many workers as fit.

    A measured speed counts in place of an estimated one if it is of the same devices.
    """
    if measured is not None and (hardware.utilisation is not None or not measured.is_on(hardware, plan.precision)):
        measured = None
    cpus = config.cluster.cpus_per_worker
    per_node = hardware.get_workers_per_node(cpus)
    if plan.is_elastic:
        most = compute_max_workers(config, hardware, per_node)
        plan = plan.with_ranks(min(plan.workers, max(plan.fewest_workers, most)))
    nodes = _count_nodes(config, plan.ranks, per_node, hardware.nodes)
    problems = tuple(_find_problems(config, plan, hardware, per_node))
    rows = _estimate_micro_batch(config, plan, hardware)
    known = hardware.utilisation or (CPU_UTILISATION if hardware.is_cpu else None)
    compute_seconds, utilisation = (
        estimate_compute_seconds(config, plan, hardware, rows, known)
        if measured is None
        else compute_measured_seconds(plan, measured)
    )
    overlapped_seconds, exposed_seconds = estimate_exchange_seconds(plan, hardware, nodes, rows)
    estimate = ClusterEstimate(
        hardware=hardware,
        nodes=nodes,
        hours=None,
        compute_seconds=compute_seconds,
        utilisation=utilisation,
        measured=measured is not None,
        overlapped_seconds=overlapped_seconds,
        exposed_seconds=exposed_seconds,
        host_seconds=0.0
        if hardware.is_cpu
        else estimate_host_seconds(config.engine.offload, count_updated_parameters(plan), nodes),
        checkpoint_gb=compute_checkpoint_copy_bytes(plan.trainable_parameters, workers=1) / 1e9,
        problems=problems,
        notes=(),
    )
    notes = (
        *([f"The speed is that of {measured.run} in its newest steps, with all its waits."] if measured else []),
        *_collect_notes(config, plan, hardware, rows),
        *collect_communication_notes(estimate.communication_seconds, compute_seconds, plan.zero),
        EXCLUDED_TIME_NOTE,
    )
    hours = None if plan.steps is None or problems else plan.steps * estimate.step_seconds / 3600
    return replace(estimate, hours=hours, notes=notes)


def _count_nodes(config: Config, workers: int, per_node: int, available: int) -> int:
    """Return the nodes that the workers occupy, at most `available`."""
    if config.cluster.placement_strategy in {"spread", "strict_spread"}:
        return min(workers, available)
    return min(-(-workers // max(per_node, 1)), available)


def _find_problems(config: Config, plan: Plan, hardware: ClusterHardware, per_node: int) -> Iterator[Problem]:
    """Find reasons why the run cannot start on this cluster."""
    if config.cluster.workers == 0:
        yield Problem(
            "no-workers-on-cluster",
            "cluster.workers",
            "0 means without Ray, on one machine",
            "Give the number of workers",
        )
        return
    wanted, device = config.cluster.gpus_per_worker, hardware.device
    if wanted == 0 and not hardware.is_cpu:
        what = f"0 trains on the cores of nodes with {device}, and the estimate is for {device}"
        yield Problem(
            "cpu-workers-on-gpu-nodes", "cluster.gpus_per_worker", what, "Remove it: auto takes one for each worker"
        )
    if wanted == 1 and hardware.is_cpu:
        yield Problem(
            "gpu-workers-on-cpu-nodes",
            "cluster.gpus_per_worker",
            "the cluster has no GPUs",
            "Remove it: auto takes none",
        )
    yield from _find_placement_problems(config, plan.fewest_workers, hardware, per_node)
    yield from _find_memory_problems(config, plan, hardware)


def _find_placement_problems(
    config: Config, workers: int, hardware: ClusterHardware, per_node: int
) -> Iterator[Problem]:
    """Find more workers than the largest cluster of the file holds with this placement strategy."""
    cpus, placement = config.cluster.cpus_per_worker, config.cluster.placement_strategy
    if per_node == 0:
        what = f"a worker of {cpus} CPUs fits into no node, which has {hardware.cpus}"
        yield Problem("too-many-cpus-per-worker", "cluster.cpus_per_worker", what, f"Use at most {hardware.cpus}")
        return
    most = compute_max_workers(config, hardware, per_node)
    if workers <= most:
        return
    limit = {"strict_pack": ", all on one node", "strict_spread": ", each on a node of its own"}.get(placement, "")
    devices = "cores" if hardware.is_cpu else hardware.device
    cluster = (
        f"{format_plural(hardware.nodes, 'node')} with {hardware.devices_per_node} {devices} and {hardware.cpus} CPUs"
    )
    what = (
        f"{workers} workers of {format_plural(cpus, 'CPU')} each{limit} are more than the largest cluster of "
        "the file holds, "
        f"which is {format_plural(most, 'worker')} on {cluster}"
    )
    yield Problem(
        "too-many-workers",
        "cluster.workers",
        what,
        f"Use at most {most} workers, or raise the nodes of the cluster file",
    )


def compute_max_workers(config: Config, hardware: ClusterHardware, per_node: int) -> int:
    """Return the workers that the largest cluster of the file holds with this placement strategy."""
    limits = {"strict_pack": per_node, "strict_spread": hardware.nodes}
    each = config.engine.ranks_per_replica
    return limits.get(config.cluster.placement_strategy, hardware.nodes * per_node) // each * each


def _find_memory_problems(config: Config, plan: Plan, hardware: ClusterHardware) -> Iterator[Problem]:
    """Find a plan that needs more memory than a device has."""
    memory_gb = plan.memory_gb_per_device
    needed, there = sum(memory_gb.values()), get_worker_memory_gb(config, hardware)
    if needed <= there:
        return
    largest = max(memory_gb, key=lambda part: memory_gb[part])
    what = (
        f"about {needed:.3g} GB a worker, and {hardware.device} has {there:.3g} GB for it; the largest part is "
        f"{largest} with {memory_gb[largest]:.3g} GB"
    )
    where, fix = suggest_memory_fix(config, plan, largest)
    yield Problem("out-of-memory", where, what, fix)


def get_worker_memory_gb(config: Config, hardware: ClusterHardware) -> float:
    """Return the memory of a worker's devices, in 10^9 bytes, without what CUDA and its libraries take of a GPU."""
    memory = hardware.memory_gb * hardware.get_devices_per_worker(config.cluster.cpus_per_worker)
    if hardware.is_cpu:  # an offload and a checkpoint's copy share the memory of the machine with the rest
        return (
            memory
            - estimate_host_bytes(plan_workload(config, config.cluster.min_workers or config.engine.ranks_per_replica))
            / 1e9
        )
    return max(memory - CUDA_RUNTIME_BYTES / 1e9, 0.0)


def _estimate_micro_batch(config: Config, plan: Plan, hardware: ClusterHardware) -> int:
    """Return the sequences per forward pass there; for `auto` the estimated number."""
    if config.train.micro_batch_size != "auto" or plan.replicas > plan.global_batch:
        return plan.micro_batch
    return choose_memory_settings(config, plan.ranks, 1e9 * get_worker_memory_gb(config, hardware)).settings.micro_batch


def _collect_notes(config: Config, plan: Plan, hardware: ClusterHardware, micro_batch: int) -> Iterator[str]:
    """Yield notes on valid but noteworthy settings on this cluster."""
    there = get_worker_memory_gb(config, hardware)
    needed = sum(plan.memory_gb_per_device.values())
    if config.train.micro_batch_size == "auto":
        yield f"train.micro_batch_size: auto takes about {micro_batch} there, by the estimate."
    elif MEMORY_FILL * there < needed <= there:
        yield f"About {needed:.3g} of {there:.3g} GB is tight: what allocators and kernels add is not counted."
    if not hardware.is_cpu:
        on_node = min(hardware.devices_per_node, plan.ranks)
        offload = "" if config.engine.offload == "none" else " and engine.offload"
        yield (
            f"Copies for checkpoints{offload} take {plan.host_memory_gb_per_worker * on_node:.3g} GB of host memory on "
            f"a node with {format_plural(on_node, 'worker')}, which a cluster file does not state."
        )
    if hardware.spot:
        yield "Nodes may be preempted (spot): what is lost then is at most the work since the last checkpoint."
