"""Time of a step on a cluster: computing, and what the workers send. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llm_training_toolkit import families
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.plan.batch import compute_accumulation_steps
from llm_training_toolkit.plan.forecast.communication import (
    ExchangeWorkload,
    count_exchanged_bytes,
    count_summed_bytes,
    count_token_bytes,
    read_reuse_distance,
)
from llm_training_toolkit.plan.forecast.hardware import ClusterHardware
from llm_training_toolkit.plan.forecast.utilisation import ComputeWorkload, estimate_pass_seconds
from llm_training_toolkit.plan.memory.activations import count_recomputed_flops
from llm_training_toolkit.plan.plan import Plan


@dataclass(frozen=True)
class MeasuredSpeed:
    """Speed that a run of this plan has reached: medians of its newest steps."""

    tokens_per_second: float
    """Of one device, counted as the plan counts them: whole sequences."""
    mfu: float
    """By the FLOPs of the documents, which are up to three times fewer than those that a plan counts."""
    peak_flops: float
    """Published FLOP/s of its devices, by which `mfu` was computed."""
    run: str

    def is_on(self, hardware: ClusterHardware, precision: str) -> bool:
        """Return whether the run had such devices: with this peak, within 5 %."""
        return abs(self.peak_flops / hardware.get_peak_flops(precision) - 1) <= 0.05


def compute_measured_seconds(plan: Plan, measured: MeasuredSpeed) -> tuple[float, float]:
    """Return the seconds of a step at a measured speed, and the share of the peak with FLOPs of recomputation.

    The share does not give the time: MFU counts loss tokens and attended tokens, and a plan an upper bound of them.
    """
    seconds = plan.tokens_per_step / (plan.ranks * measured.tokens_per_second)
    return seconds, measured.mfu * compute_hardware_flops_per_token(plan) / plan.flops_per_token


def estimate_compute_seconds(
    config: Config, plan: Plan, hardware: ClusterHardware, micro_batch: int, known: float | None
) -> tuple[float, float]:
    """Return the seconds of computing a step and the share of the peak that this is.

    By a known utilisation, or by published speeds.
    """
    devices = plan.ranks * hardware.get_devices_per_worker(config.cluster.cpus_per_worker)
    at_peak = plan.tokens_per_step * compute_hardware_flops_per_token(plan)
    at_peak /= devices * hardware.get_peak_flops(plan.precision)
    if known is not None:
        return at_peak / known, known
    ratio = hardware.get_flops_per_byte(plan.precision)
    seconds = sum(
        passes * estimate_pass_seconds(load, hardware.get_peak_flops(plan.precision), ratio)
        for passes, load in _list_passes(plan, micro_batch)
    )
    return seconds, at_peak / seconds


def _list_passes(plan: Plan, micro_batch: int) -> Iterator[tuple[int, ComputeWorkload]]:
    """Yield the passes of a step as the loop makes them: full ones, and a smaller last one of what is left.

    They are those of the replica with the most sequences, for which the others wait.
    """
    full, rest = divmod(-(-plan.global_batch // plan.replicas), micro_batch)
    if full:
        yield full, _build_compute_workload(plan, micro_batch)
    if rest:
        yield 1, _build_compute_workload(plan, rest)


def _build_compute_workload(plan: Plan, rows: int) -> ComputeWorkload:
    """Return what the time of a pass depends on; recomputation repeats attention unless it is selective."""
    dims = families.read_model_dims(plan.hf_config)
    flops = families.resolve_training_flops(plan.hf_config, plan.adapter)
    repeated = 4 / 3 if plan.activation_checkpointing == "full" else 1.0
    attended = min(plan.sequence_length, flops.window or plan.sequence_length)
    attention = repeated * flops.per_attended_token * attended
    quantized = plan.adapter is not None and plan.adapter.quantize is not None
    each = plan.tensor_parallel
    return ComputeWorkload(
        product_flops=(compute_hardware_flops_per_token(plan) - attention) / each,
        attention_flops=attention / each,
        hidden=dims.hidden,
        layers=dims.layers,
        pass_tokens=rows * plan.sequence_length // plan.sequence_parallel,
        launches="quantized" if quantized else "sharded" if plan.zero == 3 else "plain",
        recomputes=plan.activation_checkpointing != "none",
        kernels="fused" if plan.compile else "eager",
    )


def compute_hardware_flops_per_token(plan: Plan) -> float:
    """Return FLOPs per token, with what is computed again; a forward pass is a third of training the whole model.

    Ranks that hold slices of the matrices compute the output layer each.
    """
    forward = families.compute_flops_per_token(plan.hf_config, plan.sequence_length) / 3
    dims = families.read_model_dims(plan.hf_config)
    recomputed = count_recomputed_flops(plan.activation_checkpointing, dims, plan.adapter, forward)
    return plan.flops_per_token + recomputed + (plan.tensor_parallel - 1) * 6 * dims.hidden * dims.vocab


def build_exchange_workload(plan: Plan, micro_batch: int) -> ExchangeWorkload:
    """Return what the exchange of a step depends on."""
    return ExchangeWorkload(
        zero=plan.zero,
        trained=count_trained_parameters(plan),
        parameters=plan.parameters + (plan.trainable_parameters if plan.adapter else 0),
        width=2 if plan.precision == "bf16" else 4,
        passes=compute_accumulation_steps(plan.global_batch, plan.replicas, micro_batch),
        checkpointing=plan.activation_checkpointing,
        reuse_distance=read_reuse_distance(plan.deepspeed),
        second_partition=int(plan.deepspeed["zero_optimization"].get("zero_hpz_partition_size", 1)),
        gradient_width=2 if plan.deepspeed["communication_data_type"] == "bf16" else 4,
        overlaps_gradients=bool(plan.deepspeed["zero_optimization"].get("overlap_comm")),
    )


def count_trained_parameters(plan: Plan) -> int:
    """Return the trained parameters that a rank has gradients of: with cut matrices only its slices of them."""
    if plan.tensor_parallel == 1:
        return plan.trainable_parameters
    return families.read_model_dims(plan.hf_config).slice_matrices(plan.tensor_parallel).total_parameters


def count_updated_parameters(plan: Plan) -> int:
    """Return the parameters that all ranks update in a step: with cut matrices the whole ones once for each slice."""
    return plan.tensor_parallel * count_trained_parameters(plan)


def estimate_exchange_seconds(
    plan: Plan, hardware: ClusterHardware, nodes: int, micro_batch: int
) -> tuple[float, float]:
    """Return the seconds a step of what workers send while they compute, and while they wait."""
    if plan.ranks == 1 or plan.replicas > plan.global_batch:
        return 0.0, 0.0
    load = build_exchange_workload(plan, micro_batch)
    exchange = count_exchanged_bytes(load)
    each = compute_seconds_per_byte(plan, hardware, nodes)
    overlapped = exchange.overlapped * each
    if exchange.grouped:
        overlapped += exchange.grouped * compute_group_seconds_per_byte(plan, hardware, nodes, load.second_partition)
    return overlapped, exchange.exposed * each + _estimate_replica_seconds(plan, micro_batch, hardware, nodes)


def _estimate_replica_seconds(plan: Plan, micro_batch: int, hardware: ClusterHardware, nodes: int) -> float:
    """Return the seconds in which a worker sends to those of its replica; 0 if it is one by itself.

    They exchange tokens of the rows, or sum the outputs of the matrices, that they share. Replicas of consecutive
    workers are within nodes, or some lie on several. Then all workers of a node share its link for tokens. The ring of
    a sum passes it once, beside that of one more replica where a node holds parts of two.
    """
    each = plan.ranks_per_replica
    if each == 1:
        return 0.0
    count = count_token_bytes if plan.sequence_parallel > 1 else count_summed_bytes
    sent = count(
        families.read_model_dims(plan.hf_config),
        2 if plan.precision == "bf16" else 4,
        micro_batch * plan.sequence_length // plan.sequence_parallel,
        compute_accumulation_steps(plan.global_batch, plan.replicas, micro_batch),
        plan.activation_checkpointing,
    )
    links, on_node = hardware.bandwidth_gb_per_s, -(-plan.ranks // nodes)
    sharing = on_node if plan.sequence_parallel > 1 else 1 if each % on_node == 0 else 2
    link = links.between_nodes / sharing if nodes > 1 and on_node % each else links.within_node
    return sent * (each - 1) / each / (1e9 * link)


def compute_seconds_per_byte(plan: Plan, hardware: ClusterHardware, nodes: int) -> float:
    """Return the seconds that the slowest link takes for a byte of an exchange.

    In a ring every worker sends (n - 1) / n of what is reduced or gathered. NCCL's rings enter and leave a node once,
    so all links of a node together carry as much as one device sends. Workers of a node that hold other slices of the
    matrices are in rings of their own, which share the link.
    """
    links, workers = hardware.bandwidth_gb_per_s, plan.ranks
    if plan.tensor_parallel > 1:
        rings = min(plan.tensor_parallel, -(-workers // nodes))
        link = links.within_node if nodes == 1 else min(links.within_node, links.between_nodes / rings)
        peers = plan.replicas
        return (peers - 1) / peers / (1e9 * link)
    if nodes == 1:
        link = links.within_node
    elif workers > nodes:
        link = min(links.within_node, links.between_nodes)
    else:  # one worker per node
        link = links.between_nodes
    return (workers - 1) / workers / (1e9 * link)


def compute_group_seconds_per_byte(plan: Plan, hardware: ClusterHardware, nodes: int, group: int) -> float:
    """Return the seconds for a byte of an exchange within groups of consecutive workers, which fill node after node."""
    if nodes > 1 and -(-plan.ranks // nodes) % group:  # some groups lie on two nodes
        return compute_seconds_per_byte(plan, hardware, nodes)
    return (group - 1) / group / (1e9 * hardware.bandwidth_gb_per_s.within_node)
