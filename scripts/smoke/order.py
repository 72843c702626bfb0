"""Which tasks a machine gets, in which order, and which it does not get, with the reason."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

from llm_training_toolkit.config import parse_config
from llm_training_toolkit.plan import make_plan
from smoke.bench import Bench
from smoke.runner import Skipped, Task, Values

_MARGIN = 3e9
"""Bytes that tokens, small checkpoints and logs may take beside the large checkpoint."""
_RAY_STEPS = 8
_STOP_AFTER = 3


@dataclass(frozen=True)
class Times:
    """Seconds a task takes at least, and those after which it counts as hanging."""

    small: float
    large: float
    limit: float


_GPU = Times(small=20.0, large=60.0, limit=180.0)
_CPU = Times(small=4.0, large=5.0, limit=600.0)


@dataclass
class Order:
    """What runs when. Speed is measured on a machine that does nothing else."""

    first: list[Task] = field(default_factory=list)
    """One by one."""
    together: list[Task] = field(default_factory=list)
    """Side by side."""
    last: list[Task] = field(default_factory=list)
    """One by one."""
    left_out: dict[str, Skipped] = field(default_factory=dict)


def order_for(bench: Bench, packages: Values, cannot_compile: str | None = None) -> Order:
    """The tasks of a machine; `packages` says which optional ones can be imported, `cannot_compile` what is missing."""
    order = Order()
    times = _GPU if bench.on_gpu else _CPU
    large: Values = {"config": bench.large("large"), "discard": True}
    order.first.append(Task("data", "task_prepare", [large], times.small, times.limit))
    room = _no_room(bench, large["config"])
    if room is not None:
        order.left_out["large"] = order.left_out["compiled"] = order.left_out["ray"] = room
    else:
        order.first.append(Task("large", "task_train", [large], times.large, times.limit))
        if cannot_compile is None:
            compiled = {"config": bench.large("compiled", model={"compile": True}), "discard": True}
            order.first.append(Task("compiled", "task_train", [compiled], times.large, times.limit))
        else:
            order.left_out["compiled"] = Skipped(cannot_compile)
        _add_ray(order, bench, packages, times)
    _add_runs(order, bench, times)
    _add_attention(order, bench, packages, times)
    return order


def _add_runs(order: Order, bench: Bench, times: Times) -> None:
    """Small runs, whose losses are compared."""

    def train(name: str, *stages: Values, ranks: int = 1) -> Task:
        return Task(name, "task_train", stages, times.small * len(stages), times.limit, ranks)

    ranks = min(bench.gpus, 2) if bench.on_gpu else 2
    exact = {"deterministic": True}
    resumed = {"config": bench.small("resumed", run=exact)}
    order.together.append(train("resumed", resumed | {"stop_after": _STOP_AFTER}, resumed))  # the longest first
    if ranks > 1:
        order.together.append(train("two_ranks", {"config": bench.small("two_ranks")}, ranks=ranks))
    else:
        order.left_out["two_ranks"] = Skipped("one GPU")
    order.together += [
        Task("ranks", "task_ranks", [{"config": bench.small("ranks")}], times.small, times.limit, ranks=ranks),
        *(
            train(f"zero{stage}", {"config": bench.small(f"zero{stage}", engine={"zero_stage": stage})})
            for stage in range(4)
        ),
        train("fp32", {"config": bench.small("fp32", train={"precision": "fp32"})}),
        train("straight", {"config": bench.small("straight", run=exact)}),
    ]


def _add_attention(order: Order, bench: Bench, packages: Values, times: Times) -> None:
    """Every kind of attention that this machine may have; flash attention has no fp32, flex compiles for a while."""
    kinds = {
        "sdpa": ["bf16", "fp32"],
        "varlen": ["bf16"] if bench.on_gpu else ["bf16", "fp32"],
        "flash_attention_2": ["bf16"],
        "flex_attention": ["bf16"],
    }
    if not bench.on_gpu:
        order.left_out["flash_attention_2"] = order.left_out["flex_attention"] = Skipped("needs a GPU")
    elif packages["flash_attn"] is None:
        order.left_out["flash_attention_2"] = Skipped("the package flash_attn is not installed")
    for kind, precisions in kinds.items():
        if kind not in order.left_out:
            arguments = {"attention": kind, "precisions": precisions, "device": bench.device}
            stage = arguments | {"config": bench.small("attention")}
            order.together.append(Task(kind, "task_attention", [stage], times.small, times.limit))


def _add_ray(order: Order, bench: Bench, packages: Values, times: Times) -> None:
    """The large run again through Ray Train, on one worker."""
    if packages["ray"] is None:
        order.left_out["ray"] = Skipped("ray is not installed")
        return
    config = bench.large("ray", cluster={"workers": 1}, train={"steps": _RAY_STEPS})
    order.last.append(Task("ray", "task_train", [{"config": config, "discard": True}], times.large, times.limit))


def _no_room(bench: Bench, config: Values) -> Skipped | None:
    """Why the large run cannot be saved here: 12 bytes a parameter, weights and both moments in fp32."""
    parameters = make_plan(parse_config(config, "gpu smoke")).parameters
    wanted, free = 12 * parameters + _MARGIN, shutil.disk_usage(bench.work).free
    if wanted <= free:
        return None
    return Skipped(f"{bench.work.parent} has {free / 1e9:.1f} GB free, {wanted / 1e9:.1f} are needed: set TMPDIR")
