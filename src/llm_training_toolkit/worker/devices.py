"""Checks rank placement before anything is built: one device type, no two ranks on one GPU."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from llm_training_toolkit.config import Config
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import NoteEvent, WarningEvent
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.worker.spec import WorkerSpec

_NODES_NAMED = 4  # nodes named in the placement message; more are only counted, and the attempt's file lists all
_MIG_PREFIX = "MIG-"  # prefix in CUDA_VISIBLE_DEVICES of a GPU slice, which has its own memory and processors
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class RankPlacement:
    """Node and device of a rank."""

    node: str
    machine: str
    local_rank: int
    """Rank within the node."""
    device: str
    """`cpu`, or `cuda:3` in the numbering of the rank."""
    model: str
    """GPU model; empty on CPU."""
    unit: str
    """UUID of the GPU or of its slice, unique among ranks; empty on CPU."""
    cores: int
    """CPU cores that this process may use."""

    @property
    def device_type(self) -> str:
        """`cpu` or `cuda`."""
        return self.device.partition(":")[0]

    def to_json(self) -> dict[str, Any]:
        """Return the record for the attempt's file."""
        return asdict(self)


def check_placement(spec: WorkerSpec, context: RunContext) -> list[RankPlacement]:
    """Return the placement of every rank, by rank; rank 0 reports a summary. Collective.

    Raises LaunchError on every rank if two ranks share a device, or the device type is not the one asked for.
    """
    placements = context.all_gather_object(_find_own_placement(spec, context.device))
    wrong = find_placement_problem(placements, spec.config.cluster.gpus_per_worker)
    if wrong:
        raise LaunchError(wrong)
    if context.is_rank_zero and context.world_size > 1:
        context.report(NoteEvent(format_placement(placements)))
        for message in find_placement_warnings(placements, spec.config):
            context.report(WarningEvent(message))
    return placements


def _find_own_placement(spec: WorkerSpec, device: torch.device) -> RankPlacement:
    model = unit = ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        named = visible[device.index or 0] if len(visible) > (device.index or 0) else ""
        model, unit = properties.name, named if named.startswith(_MIG_PREFIX) else str(properties.uuid)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return RankPlacement(spec.node, spec.machine, local_rank, str(device), model, unit, len(os.sched_getaffinity(0)))


def find_placement_problem(placements: Sequence[RankPlacement], gpus_per_worker: int | str) -> str | None:
    """Return the reason why ranks must not use these devices, with the remedy; None if they may."""
    kinds: Mapping[str, Sequence[int]] = _group_ranks([placement.device_type for placement in placements])
    if len(kinds) > 1:
        on = "; ".join(
            f"{_format_ranks(ranks)} on {kind} (node {_format_nodes(placements, ranks)})"
            for kind, ranks in kinds.items()
        )
        return (
            f"the ranks compute on devices of different kinds: {on}. Where it is cpu, torch finds no GPU: `nvidia-smi` "
            "there says whether the driver sees one. Or train on CPU everywhere: cluster.gpus_per_worker=0"
        )
    required_type = {0: "cpu", 1: "cuda"}.get(gpus_per_worker if isinstance(gpus_per_worker, int) else -1)
    if required_type is not None and required_type not in kinds:
        return f"cluster.gpus_per_worker = {gpus_per_worker}, but the ranks compute on {next(iter(kinds))}"
    remedy = "let Ray or torchrun alone set CUDA_VISIBLE_DEVICES and LOCAL_RANK (cluster.env must not)"
    for unit, ranks in _group_ranks([placement.unit for placement in placements]).items():
        if unit and len(ranks) > 1:
            one = placements[ranks[0]]
            return (
                f"{_format_ranks(ranks)} share one GPU, {one.model} {unit} of node {one.node}: start no more "
                "ranks there than "
                f"it has GPUs, and {remedy}"
            )
    numbers = _group_ranks([(placement.machine, placement.node, placement.local_rank) for placement in placements])
    for (_, node, local_rank), ranks in numbers.items():
        if len(ranks) > 1:
            return f"{_format_ranks(ranks)} all have LOCAL_RANK = {local_rank} on node {node}: {remedy}"
    return None


def find_placement_warnings(placements: Sequence[RankPlacement], config: Config) -> list[str]:
    """Return warnings about placements that are valid but slow."""
    said = []
    models = _group_ranks([placement.model for placement in placements])
    if len(models) > 1:
        on = ", ".join(f"{_format_ranks(ranks)} on {model}" for model, ranks in models.items())
        said.append(f"GPUs of several models: {on}. Every step takes as long as on the slowest, with equal shares")
    engine = config.engine
    parted = find_parted_replicas([placement.node for placement in placements], engine.ranks_per_replica)
    if parted:
        of = ", ".join(_format_ranks(ranks) for ranks in parted)
        what = "rows (engine.sequence_parallel)" if engine.tensor_parallel == 1 else "matrices (engine.tensor_parallel)"
        said.append(
            f"{of} share {what} on several nodes, and send between them in every layer: let each node have a multiple "
            "of it"
        )
    each = config.cluster.cpus_per_worker
    for node, ranks in _group_ranks([placement.node for placement in placements]).items():
        cores = max(placements[rank].cores for rank in ranks)
        if placements[ranks[0]].device_type == "cpu" and len(ranks) * each > cores:
            said.append(
                f"node {node} has {cores} cores for {len(ranks)} ranks with {each} threads each, which take turns: "
                "Ray was told of more (`ray start --num-cpus`)"
            )
    return said


def find_parted_replicas(nodes: Sequence[str], ranks_per_replica: int) -> list[list[int]]:
    """Return the ranks of each replica that is on several nodes; `nodes` are those of the ranks."""
    # Ranks that make no whole replica are refused elsewhere, by the number of workers.
    starts = range(0, len(nodes) - ranks_per_replica + 1, ranks_per_replica)
    replicas = [list(range(start, start + ranks_per_replica)) for start in starts]
    return [ranks for ranks in replicas if len({nodes[rank] for rank in ranks}) > 1]


def format_placement(placements: Sequence[RankPlacement]) -> str:
    """Format as `ranks 0 to 7 on node a (cuda:0 to cuda:7), ranks 8 to 15 on node b (…), each NVIDIA H100`."""
    nodes = _group_ranks([placement.node for placement in placements])
    models = sorted({placement.model for placement in placements} - {""})
    each = f", each {models[0]}" if len(models) == 1 else ""
    if len(nodes) > _NODES_NAMED:
        sizes = Counter(len(ranks) for ranks in nodes.values())
        many = ", ".join(f"{number} nodes with {size} each" for size, number in sorted(sizes.items(), reverse=True))
        return (
            f"{len(placements)} ranks: {many}, on {placements[0].device_type}{each}; which is where is in the "
            "attempt's file"
        )
    placed = [
        f"{_format_ranks(ranks)} on node {node} ({_format_devices(placements, ranks)})" for node, ranks in nodes.items()
    ]
    return f"{', '.join(placed)}{each}"


def _format_devices(placements: Sequence[RankPlacement], ranks: Sequence[int]) -> str:
    found = list(dict.fromkeys(placements[rank].device for rank in ranks))
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _format_nodes(placements: Sequence[RankPlacement], ranks: Sequence[int]) -> str:
    return ", ".join(dict.fromkeys(placements[rank].node for rank in ranks))


def _format_ranks(ranks: Sequence[int]) -> str:
    """Format as `rank 3`, `ranks 0 and 2`, `ranks 0 to 7`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _group_ranks(keys: Sequence[K]) -> dict[K, list[int]]:
    """Return the ranks of each key, with keys in order of first appearance."""
    found: defaultdict[K, list[int]] = defaultdict(list)
    for rank, key in enumerate(keys):
        found[key].append(rank)
    return dict(found)
