"""Resolution of `model.compile` on the ranks, by the run so far, devices, compilers and the length of the run."""

from __future__ import annotations

import torch

from llm_training_toolkit.checkpoint import Manifest
from llm_training_toolkit.config import Config
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import NoteEvent
from llm_training_toolkit.errors import PlanError, TrainingError
from llm_training_toolkit.plan import (
    Plan,
    choose_compilation,
    estimate_run_seconds,
    find_compile_problem,
    find_device_peak,
)
from llm_training_toolkit.plan.compilation import COMPILE_KEY
from llm_training_toolkit.setup.machine import find_compiler_problem


def resolve_compilation(config: Config, plan: Plan, context: RunContext, manifest: Manifest | None) -> Plan:
    """Return the plan with `model.compile` resolved. Collective; ZeRO stage and attention must be resolved before.

    At a resume `auto` is what the checkpoint was computed with, if layers can be compiled here. `manifest` is the
    checkpoint's. Raises PlanError on every rank if layers have to be compiled and cannot be.
    """
    if config.model.compile is False:
        return plan
    found = context.all_gather_object(find_compiler_problem(gpu=context.device.type == "cuda"))
    missing = next((f"rank {rank}: {problem}" for rank, problem in enumerate(found) if problem), None)
    if config.model.compile is True:
        _check_compilation(config, plan, context, missing)
        return plan
    begun = None if manifest is None else manifest.extra.get("compile")
    seconds = _estimate_seconds(plan, context)
    chosen = context.broadcast_object(
        choose_compilation(config, plan.hf_config, context.device.type, seconds, missing, begun=begun)
    )
    if context.is_rank_zero and context.device.type != "cpu":
        context.report(NoteEvent(str(chosen)))
    return plan.with_compilation(chosen)


def _check_compilation(config: Config, plan: Plan, context: RunContext, missing: str | None) -> None:
    problem = find_compile_problem(config, plan.hf_config)
    if problem is not None:
        raise PlanError(str(problem))
    if missing is None and context.device.type == "cpu" and config.model.attn_implementation == "varlen":
        missing = "varlen on CPU is a loop over documents, which cannot be compiled: use sdpa"
    if missing is not None:
        raise PlanError(f"{COMPILE_KEY} = true: {missing}")


def build_compile_error(error: BaseException) -> TrainingError:
    """Return the error of a run whose layers could not be compiled; new workers would fail again."""
    first = str(error).strip().partition("\n")[0]
    return TrainingError(
        f"{COMPILE_KEY}: torch.compile failed ({type(error).__name__}: {first}). Set model.compile to false: the same "
        "command resumes, and the result differs by rounding alone"
    )


def build_shared_memory_error(error: BaseException, config: Config, *, compiled: bool) -> TrainingError:
    """Return the error of a run with a kernel that is too large for this GPU; new workers would fail again."""
    ways = [f"{COMPILE_KEY} to false"] if compiled else []
    ways += ["model.attn_implementation to sdpa"] if config.model.attn_implementation == "flex_attention" else []
    remedy = f"Set {' or '.join(ways)}" if ways else "Train on GPUs with more of it"
    return TrainingError(
        f"a kernel of Triton takes more shared memory than this GPU has ({error}). {remedy}: the same command resumes"
    )


def _estimate_seconds(plan: Plan, context: RunContext) -> float | None:
    """Return the seconds that the whole run computes by the published peak of this rank's GPU, or None without one."""
    if context.device.type != "cuda" or plan.steps is None:
        return None
    peak = find_device_peak(torch.cuda.get_device_name(context.device))
    flops = float(plan.flops_per_token) * plan.tokens_per_step * plan.steps
    return estimate_run_seconds(flops, context.world_size, None if peak is None else peak.get_flops(plan.precision))
