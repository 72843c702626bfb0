"""The rows of the table: what the tasks found, what was expected, and whether that is right."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llm_training_toolkit.plan.forecast.device_peaks import find_device_peak
from smoke.bench import WARM_UP, Bench
from smoke.runner import Done, Failed, Result, Skipped, Values

_LOSS = 0.01
"""Share by which losses of one run in two ways (precision, ZeRO stage, number of ranks) may differ."""
_FP32_ATTENTION = 1e-3
_BF16_ATTENTION = 1.5
"""How many times the error of eager attention in bf16 another kind may make in bf16."""
_ROUNDING = 1e-3
_MEMORY = (0.7, 1.3)
"""Measured memory as a share of the plan's estimate; beyond it the plan misleads."""
_LEAST_MFU = 0.05
"""Below it something is wrong with the machine, whatever the card."""

Verdict = Literal["ok", "failed", "skipped"]
Found = tuple[Verdict, str, str]
"""Verdict, value, what was expected."""
Stages = Mapping[str, Sequence[Values]]
"""What the stages of each task gave."""
Assessment = Callable[[Stages, Bench, Values], Found]
"""From stages, bench and facts of the machine to a finding."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    result: Verdict
    value: str
    """What was found, or why there is nothing."""
    expected: str = ""


@dataclass(frozen=True)
class Check:
    """A row to be, and the tasks it is judged by."""

    name: str
    tasks: Sequence[str]
    assess: Assessment
    optional: bool = False
    """A task that fails means that this machine does not have it."""

    def row(self, results: Mapping[str, Result], bench: Bench, machine: Values) -> Row:
        """The row; where a task failed or was left out, that is the row."""
        found = {task: results[task] for task in self.tasks}
        for task, result in found.items():
            if isinstance(result, Failed) and self.optional:
                return Row(self.name, "skipped", f"does not work here: {result.reason}")
            if isinstance(result, Failed):
                return Row(self.name, "failed", f"{task}: {result.reason}")
        for result in found.values():
            if isinstance(result, Skipped):
                return Row(self.name, "skipped", result.reason)
        stages = {task: result.stages for task, result in found.items() if isinstance(result, Done)}
        return Row(self.name, *self.assess(stages, bench, machine))


def _verdict(*conditions: bool) -> Verdict:
    return "ok" if all(conditions) else "failed"


def _apart(first: Sequence[float], second: Sequence[float]) -> float:
    """The largest relative difference between the losses of two runs of one length."""
    return max(abs(a - b) / abs(b) for a, b in zip(first, second, strict=True))


def _falls(losses: Sequence[float]) -> bool:
    return all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def _binding(stages: Stages, bench: Bench, _machine: Values) -> Found:
    found = stages["ranks"][0]["binding"]
    wanted = [f"cuda:{rank}" if bench.on_gpu else "cpu" for rank in range(len(found))]
    right = all(row["tensors_on"] == [device] for row, device in zip(found, wanted, strict=True))
    current = not bench.on_gpu or [row["current_device"] for row in found] == list(range(len(found)))
    value = "; ".join(f"rank {row['rank']} on {', '.join(row['tensors_on'])}" for row in found)
    expected = "weights and optimizer of each rank on its own GPU"
    if right and not bench.on_gpu:
        return "skipped", f"needs a GPU (here: {value})", expected
    return _verdict(right, current), value, expected


def _all_reduce(stages: Stages, bench: Bench, _machine: Values) -> Found:
    found = stages["ranks"][0]
    wanted, backend = found["expected_sum"], "nccl" if bench.on_gpu else "gloo"
    if found["world_size"] == 1:
        return "skipped", "one GPU", f"{backend}: the sum over two ranks"
    sums = [value for pair in found["sums"].values() for value in pair]
    value = (
        f"{found['backend']}: sum {max(sums, key=lambda each: abs(each - wanted)):g} over {found['world_size']} ranks"
    )
    value += f", {found['bus_gb_per_second']:,.1f} GB/s"
    right = _verdict(set(sums) == {wanted}, found["backend"] == backend)
    return right, value, f"{backend}: sum {wanted:g} in fp32 and bf16"


def _precision(stages: Stages, _bench: Bench, _machine: Values) -> Found:
    low, full = stages["zero2"][0]["losses"], stages["fp32"][0]["losses"]
    away = _apart(low, full)
    value = f"loss {low[0]:.3f} to {low[-1]:.3f} in {len(low)} steps, at most {away:.2%} from fp32"
    return _verdict(_falls(low), away <= _LOSS), value, f"finite, falls, within {_LOSS:.0%} of fp32"


def _attention(kind: str) -> Assessment:
    def assess(stages: Stages, _bench: Bench, _machine: Values) -> Found:
        found = stages[kind][0]
        faults = [f"{name} in {precision}" for precision in found for name in attention_faults(found[precision])]
        if "fp32" in found and found["fp32"]["error"] > _FP32_ATTENTION:
            faults.append("logits in fp32")
        value = ", ".join(
            f"{precision} off by {each['error']:.1e} (eager {each['eager_error']:.1e}), leak {each['leak']:.0e}"
            for precision, each in found.items()
        )
        value += f"; wrong: {', '.join(faults)}" if faults else ""
        return (
            _verdict(not faults),
            value,
            "as near to eager in fp32 as eager in bf16 is; documents do not see each other",
        )

    return assess


def attention_faults(found: Values) -> list[str]:
    """What is wrong with the numbers of one kind of attention in one precision; empty where nothing is."""
    allowed = _BF16_ATTENTION * found["eager_error"] + _ROUNDING
    gradient = _BF16_ATTENTION * found["eager_gradient_error"] + _ROUNDING
    right = {
        "logits": found["error"] <= allowed,
        "gradient": found["gradient_error"] <= gradient,
        "a document alone": found["alone_error"] <= 2 * allowed,
        "leak between documents": found["leak"] <= 1e-6 * found["scale"],
        "the document that was changed": found["change"] > 1e-2 * found["scale"],
    }
    return [name for name, good in right.items() if not good]


def _zero(stage: int) -> Assessment:
    def assess(stages: Stages, _bench: Bench, _machine: Values) -> Found:
        losses = stages[f"zero{stage}"][0]["losses"]
        away = _apart(losses, stages["zero2"][0]["losses"])
        value = f"loss {losses[0]:.3f} to {losses[-1]:.3f}, at most {away:.2%} from ZeRO 2"
        return _verdict(_falls(losses), away <= _LOSS), value, f"finite, falls, within {_LOSS:.0%} of ZeRO 2"

    return assess


def _two_ranks(stages: Stages, _bench: Bench, _machine: Values) -> Found:
    away = _apart(stages["two_ranks"][0]["losses"], stages["zero2"][0]["losses"])
    return _verdict(away <= _LOSS), f"losses at most {away:.2%} from one rank's", f"within {_LOSS:.0%}"


def _resume(stages: Stages, _bench: Bench, _machine: Values) -> Found:
    straight, (stopped, resumed) = stages["straight"][0], stages["resumed"]
    losses = straight["losses"] == resumed["losses"]
    state = straight["checkpoint"]["sha256"] == resumed["checkpoint"]["sha256"]
    went = stopped["status"] == "stopped" and resumed["status"] == "finished" and resumed["attempts"] == 2
    say = {True: "equal bit for bit", False: "DIFFERENT"}
    value = (
        f"stopped after {stopped['step']} of {resumed['step']} steps: losses {say[losses]}, "
        f"weights and optimizer {say[state]}"
    )
    return _verdict(losses, state, went), value, "as without the stop, bit for bit (run.deterministic)"


def speed_of(run: Values) -> tuple[float, float]:
    """Tokens a second and seconds of the median step after the warm-up."""
    seconds = statistics.median(run["seconds"][WARM_UP - 1 :])
    return run["tokens_per_step"] / seconds, seconds


def _speed(stages: Stages, _bench: Bench, _machine: Values) -> Found:
    run = stages["large"][0]
    rate, seconds = speed_of(run)
    checkpoint = run["checkpoint"]
    value = (
        f"{rate:,.0f} tokens/s: {seconds:.3f} s a step of {run['tokens_per_step']:,} tokens in micro-batches of "
        f"{run['micro_batch']}, {run['parameters'] / 1e6:,.1f}M parameters; checkpoint of "
        f"{checkpoint['bytes'] / 1e9:.2f} GB in {checkpoint['seconds']:.1f} s"
    )
    return _verdict(_falls(run["losses"])), value, "measured; the loss falls"


def _utilization(stages: Stages, bench: Bench, machine: Values) -> Found:
    run = stages["large"][0]
    known = find_device_peak(machine["gpu"]) if bench.on_gpu else None
    flops, source = machine["matmul_flops"], "no peak known: a matrix product measured here"
    if known is not None and known.bf16 is not None:
        flops, source = 1e12 * known.bf16, known.source
    share = run["flops_per_token"] * speed_of(run)[0] / flops
    value = f"{share:.1%} of {flops / 1e12:,.3g} TFLOP/s ({source})"
    if not bench.on_gpu:
        return "skipped", f"needs a GPU (here: {value})", ""
    measured = f", {run['flops_per_token'] * speed_of(run)[0] / machine['matmul_flops']:.1%} of a matrix product here"
    return _verdict(share >= _LEAST_MFU), value + (measured if known else ""), f"at least {_LEAST_MFU:.0%}"


def _memory(stages: Stages, bench: Bench, _machine: Values) -> Found:
    run = stages["large"][0]
    planned = sum(run["plan_gb"].values())
    low, high = _MEMORY
    expected = f"{low} to {high} of the plan's"
    if not bench.on_gpu:
        return "skipped", f"needs a GPU (the plan says {planned:.3f} GB)", expected
    ratio = run["peak_gb"] / planned
    value = f"{run['peak_gb']:.2f} GB, {ratio:.2f} of the plan's {planned:.2f} GB"
    return _verdict(low <= ratio <= high), value, expected


def _compiled(stages: Stages, bench: Bench, _machine: Values) -> Found:
    run, beside = stages["compiled"][0], stages["large"][0]
    rate, without = speed_of(run)[0], speed_of(beside)[0]
    away = _apart(run["losses"][:WARM_UP], beside["losses"][:WARM_UP])
    value = f"{rate:,.0f} tokens/s, {rate / without:.2f} of those without"
    if bench.on_gpu:
        value += f"; {run['peak_gb']:.2f} GB, without {beside['peak_gb']:.2f}"
    value += f"; first losses {away:.2%} apart"
    return _verdict(_falls(run["losses"]), away <= _LOSS), value, f"first losses within {_LOSS:.0%}"


def _on_ray(stages: Stages, _bench: Bench, _machine: Values) -> Found:
    run, beside = stages["ray"][0], stages["large"][0]
    rate, without = speed_of(run)[0], speed_of(beside)[0]
    away = _apart(run["losses"][:2], beside["losses"][:2])  # later ones differ with the length of the schedule
    value = f"{rate:,.0f} tokens/s, {rate / without:.2f} of those without Ray; first losses {away:.2%} apart"
    good = _verdict(run["status"] == "finished", _falls(run["losses"]), away <= _LOSS)
    return good, value, f"finishes, first losses within {_LOSS:.0%}"


CHECKS = (
    Check("device binding", ["ranks"], _binding),
    Check("all-reduce", ["ranks"], _all_reduce),
    Check("bf16", ["zero2", "fp32"], _precision),
    Check("sdpa", ["sdpa"], _attention("sdpa")),
    Check("varlen", ["varlen"], _attention("varlen")),
    Check("flash_attention_2", ["flash_attention_2"], _attention("flash_attention_2")),
    Check("flex_attention", ["flex_attention"], _attention("flex_attention"), optional=True),
    *(Check(f"ZeRO {stage}", [f"zero{stage}", "zero2"], _zero(stage)) for stage in range(4)),
    Check("two ranks", ["two_ranks", "zero2"], _two_ranks),
    Check("save and resume", ["straight", "resumed"], _resume),
    Check("speed", ["large"], _speed),
    Check("MFU", ["large"], _utilization),
    Check("peak memory", ["large"], _memory),
    Check("compiled layers", ["compiled", "large"], _compiled),
    Check("Ray Train", ["ray", "large"], _on_ray),
)
"""Every row of the table, in its order."""
