"""Plan as text for the terminal: one aligned line per fact."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from llm_training_toolkit.families import AdapterSpec
from llm_training_toolkit.plan.forecast.cluster_estimate import ClusterEstimate
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing
from llm_training_toolkit.plan.plan import Plan
from llm_training_toolkit.plan.problem import format_plural

_SPREAD = (
    "spreads nothing",
    "spreads optimizer state",
    "spreads optimizer state and gradients",
    "spreads optimizer state, gradients and weights",
)


_CHECKPOINTING: dict[ActivationCheckpointing, str] = {
    "none": "kept for the backward pass",
    "selective": "recomputed, except attention and every second matrix product (selective)",
    "full": "recomputed layer by layer (full)",
}


def format_plan(plan: Plan, forecast: ClusterEstimate | None = None) -> list[str]:
    """Format the plan in about a dozen lines, with a few more for a cluster; notes and problems come last."""
    rows = [*_iter_rows(plan), *(_iter_cluster_rows(forecast) if forecast else ())]
    rows += [*(("note", note) for note in plan.notes), *(("PROBLEM", str(each)) for each in plan.problems)]
    width = max(len(label) for label, _ in rows)
    return [f"{label:<{width}}  {text}" for label, text in rows]


def _iter_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "run", plan.name
    yield (
        "model",
        f"{plan.model}, {format_large_number(plan.parameters)} parameters "
        f"({plan.parameters:,}){_format_active_parameters(plan)}, {_format_precision(plan)}",
    )
    if plan.adapter is not None:
        yield "adapters", _format_adapters(plan, plan.adapter)
    yield "data", f"sequences of {plan.sequence_length:,} tokens, {_format_passes(plan)}"
    for line in format_mixture(plan):
        yield "source", line
    yield "batch", _format_batch(plan)
    yield from _iter_elastic_rows(plan)
    yield "length", _format_length(plan)
    yield "learning rate", _format_lr_schedule(plan)
    yield "DeepSpeed", _format_zero_stage(plan)
    yield "activations", _format_checkpointing(plan)
    yield "compile", _format_compilation(plan)
    yield "memory", _format_memory(plan)
    yield (
        "compute",
        f"{format_large_number(plan.flops_per_token)} FLOPs a token, "
        f"{format_large_number(plan.flops_per_token * plan.tokens_per_step)} a step",
    )
    yield (
        "checkpoints",
        f"every {_format_save_interval(plan)}; evaluation every {format_plural(plan.eval_every, 'step')}",
    )


def _format_precision(plan: Plan) -> str:
    return "bf16, or what the workers measure to be faster" if "precision" in plan.estimated else plan.precision


def _format_zero_stage(plan: Plan) -> str:
    if plan.tensor_parallel > 1:
        stage = f"ZeRO {plan.zero}{' (auto)' if 'zero' in plan.estimated else ''}"
        spread = f"{_SPREAD[plan.zero]} over {format_plural(plan.replicas, 'replica')}"
        cut = f"{plan.tensor_parallel} workers to a replica hold slices of the matrices"
        return f"{cut}; {stage} {spread}" if plan.replicas > 1 else f"{cut}; {stage}"
    if "zero" not in plan.estimated:
        return f"ZeRO {plan.zero} {_SPREAD[plan.zero]} over {_format_workers(plan)}"
    if plan.ranks == 1:
        return f"ZeRO {plan.zero} (auto): one worker spreads nothing"
    return (
        f"ZeRO {plan.zero} (auto) {_SPREAD[plan.zero]} over {_format_workers(plan)}; a higher stage where memory is "
        "short"
    )


def _format_checkpointing(plan: Plan) -> str:
    if "activation_checkpointing" in plan.estimated:
        return "kept (activation_checkpointing auto), or recomputed as far as memory is short"
    return _CHECKPOINTING[plan.activation_checkpointing]


def _format_compilation(plan: Plan) -> str:
    if "compile" in plan.estimated:
        return "on GPUs, in runs of about an hour and more (auto)"
    reason = f" (auto): {plan.compile_reason}" if plan.compile_reason else ""
    return f"{'each decoder layer by torch.compile' if plan.compile else 'no'}{reason}"


def _format_active_parameters(plan: Plan) -> str:
    few = plan.active_parameters < plan.parameters
    return f", of which a token passes {format_large_number(plan.active_parameters)}" if few else ""


def format_mixture(plan: Plan) -> list[str]:
    """Format share and epochs of each source with a weight; empty without weights."""
    return [
        f"{source.path}: {source.share:.1%} of the tokens"
        + ("" if source.epochs is None else f", {source.epochs:.3g} epochs")
        for source in plan.horizon.mixture
    ]


def _format_adapters(plan: Plan, adapter: AdapterSpec) -> str:
    kind = ("QLoRA" if adapter.quantize else "LoRA") + (" with DoRA" if adapter.dora else "")
    target_names = ", ".join((*adapter.target_names, *(f"all of {name}" for name in adapter.modules_to_save)))
    trained = plan.trainable_parameters
    share = f"{trained:,}, {trained / plan.parameters:.2%} of the model"
    what = f"{kind} rank {adapter.rank}, scaled by {adapter.scaling:.3g}, on {target_names}"
    return f"{what}; {format_large_number(trained)} parameters trained ({share})"


def _iter_cluster_rows(forecast: ClusterEstimate) -> Iterator[tuple[str, str]]:
    hardware, price = forecast.hardware, forecast.hardware.price_per_hour
    devices = "cores" if hardware.is_cpu else f"{hardware.device} ({hardware.memory_gb:g} GB)"
    nodes, terms = format_plural(hardware.nodes, "node"), "spot" if hardware.spot else "on demand"
    yield "cluster", f"{forecast.nodes} of {nodes}, each with {hardware.devices_per_node} {devices}, {terms}"
    hours, cost, usual = forecast.hours, forecast.cost_usd, f"devices reach {forecast.utilisation:.0%} of their peak"
    head = f", the head at ${price.head:,.2f}" if price.head else ""
    hourly = (
        f"${forecast.usd_per_hour:,.2f} an hour: {format_plural(forecast.nodes, 'node')} at ${price.node:,.2f}{head}"
    )
    unknown = "it does not fit there" if forecast.problems else "known when the data is prepared"
    yield "time", unknown if hours is None else f"about {_format_hours(hours)}, if {usual}"
    yield (
        "cost",
        unknown if cost is None else f"about ${cost:,.{0 if cost >= 100 else 2}f} at {hourly}; prices of {price.date}",
    )
    step = f"computing about {forecast.compute_seconds:.3g} s"
    if forecast.communication_seconds:
        step += f"; sending {forecast.communication_seconds:.3g} s over the slowest link"
        step += f", {forecast.overlapped_seconds:.3g} s of it meanwhile" if forecast.overlapped_seconds else ""
    if forecast.host_seconds:
        step += f"; updating in host memory {forecast.host_seconds:.3g} s, on a host of 64 cores"
    yield "step", step
    yield "storage", f"a checkpoint of {forecast.checkpoint_gb:.3g} GB takes {forecast.checkpoint_seconds:.3g} s"


def _format_hours(hours: float) -> str:
    return f"{hours:,.3g} hours" if hours >= 1 else f"{60 * hours:.3g} minutes"


def _format_passes(plan: Plan) -> str:
    if plan.horizon.mixture:
        return "mixed by weight"
    return "not prepared yet" if plan.horizon.epochs is None else f"{plan.horizon.epochs:.3g} epochs"


def _format_batch(plan: Plan) -> str:
    if plan.replicas > plan.global_batch:
        return f"global batch {plan.global_batch} cannot be divided among {plan.replicas} replicas"
    shares = plan.split_batch()
    share = f"{shares[0]}" if shares[0] == shares[-1] else f"({shares[-1]} or {shares[0]})"
    replicas = format_plural(plan.replicas, "replica") + _format_replica_ranks(plan)
    if "micro_batch" in plan.estimated:
        return f"global batch {plan.global_batch} = {replicas} x {share}, in micro-batches as large as memory allows"
    passes = format_plural(plan.get_accumulation_steps(), "micro-batch", "es")
    return f"global batch {plan.global_batch} = {replicas} x {share}, in {passes} of {plan.micro_batch}"


def _format_replica_ranks(plan: Plan) -> str:
    return f" of {plan.ranks_per_replica} workers" if plan.ranks_per_replica > 1 else ""


def _iter_elastic_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield the batch of an elastic run at every size; sizes with equal numbers of micro-batches share a line."""
    each = plan.ranks_per_replica
    sizes = range(max(plan.fewest_workers, each), min(plan.workers, each * plan.global_batch) + 1, each)

    def count_steps(workers: int) -> int:
        return plan.get_accumulation_steps(plan.count_replicas(workers))

    for _, same in itertools.groupby(sizes if plan.is_elastic else (), key=count_steps):
        worlds = list(same)
        low, high = (plan.split_batch(plan.count_replicas(world)) for world in (worlds[-1], worlds[0]))
        share = f"{low[-1]}" if low[-1] == high[0] else f"{low[-1]} to {high[0]}"
        passes = format_plural(count_steps(worlds[0]), "micro-batch", "es")
        settled = "" if "micro_batch" in plan.estimated else f", in {passes} of {plan.micro_batch}"
        ends = format_plural(worlds[0], "worker") if len(worlds) == 1 else f"{worlds[0]} to {worlds[-1]} workers"
        yield "", f"with {ends}: {share} each{settled}"


def _format_workers(plan: Plan) -> str:
    if plan.is_elastic:
        return f"{plan.fewest_workers} to {plan.workers} workers"
    return format_plural(plan.ranks, "worker")


def _format_length(plan: Plan) -> str:
    if plan.steps is None:
        return f"known when the data is prepared; {plan.tokens_per_step:,} tokens a step"
    about = "about " if plan.horizon.steps_estimated else ""
    total = plan.steps * plan.tokens_per_step
    return (
        f"{about}{format_plural(plan.steps, 'step')} x {plan.tokens_per_step:,} tokens = "
        f"{about}{format_large_number(total)} tokens"
    )


def _format_lr_schedule(plan: Plan) -> str:
    horizon = plan.horizon
    warmup = "a share of the run" if horizon.warmup_steps is None else format_plural(horizon.warmup_steps, "step")
    shape = "" if plan.schedule_kind == "constant" else f" to {plan.lr_floor:.3g}"
    decay = f" over the last {format_plural(horizon.decay_steps, 'step')}" if horizon.decay_steps else ""
    return f"{plan.lr:.3g}, {plan.schedule_kind}{shape}{decay}, warm-up {warmup}"


def _format_memory(plan: Plan) -> str:
    memory_gb = plan.memory_gb_per_device
    listed = ", ".join(f"{part} {size:.3g}" for part, size in memory_gb.items())
    least = " at least" if "micro_batch" in plan.estimated else ""
    smallest = f" with {format_plural(plan.fewest_workers, 'worker')}" if plan.is_elastic else ""
    host = f"; and {plan.host_memory_gb_per_worker:.3g} GB of host memory a worker"
    return f"about {sum(memory_gb.values()):.3g} GB a device{least}{smallest}: {listed}{host}"


def _format_save_interval(plan: Plan) -> str:
    if plan.save_every_steps is not None:
        return format_plural(plan.save_every_steps, "step")
    seconds = plan.save_every_seconds or 0.0
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"


def format_large_number(value: float) -> str:
    """Format a large number with three digits: 596M, 8.19B, 1.2e+18."""
    for size, unit in ((1e15, ""), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}" if unit else f"{value:.3g}"
    return f"{value:g}"
