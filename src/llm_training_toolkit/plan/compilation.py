"""Resolution of `model.compile`: what cannot be compiled, and whether a run wins back the time of compiling. Pure."""

from __future__ import annotations

from llm_training_toolkit import families
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.families import HfValues
from llm_training_toolkit.plan.auto import ResolvedValue
from llm_training_toolkit.plan.problem import Problem

COMPILE_KEY = "model.compile"
_COMPILED_ATTENTION = frozenset({"auto", "varlen", "sdpa", "eager"})
# Compiled layers may save 10 % of a run's time (an assumption: published gains are 15 to 30 %), six minutes of an hour.
# Compiling may take two minutes at each start whose caches are empty (also assumed; neither was measured here).
_LEAST_SECONDS = 3600.0
_UTILISATION = 0.4  # of the peak: between the published speeds of 1B and 7B models (docs/performance.md)


def find_compile_problem(config: Config, hf: HfValues) -> Problem | None:
    """Return the reason against whole compilation of this run's layers, as far as the configuration shows."""
    lora, attention = config.model.lora, config.model.attn_implementation
    on_cpu = config.cluster.gpus_per_worker == 0
    found = {
        (
            "at ZeRO 3 DeepSpeed gathers the weights of a layer in hooks, which would cut it into many graphs",
            "Use engine.zero_stage 0, 1 or 2",
        ): config.engine.zero_stage == 3 or config.engine.offload == "optimizer_and_weights",
        (
            f"{config.model.name} has linear attention, which cannot be compiled whole",
            "Leave it out",
        ): families.read_model_dims(hf).linear_attention is not None,
        ("DoRA in peft cannot be compiled whole", "Use LoRA without use_dora"): lora is not None and lora.use_dora,
        ("layers with 4-bit weights were never compiled", "Leave it out"): lora is not None
        and lora.quantize is not None,
        ("the exchange of tokens between ranks was never compiled", "Leave it out"): config.engine.sequence_parallel
        > 1,
        ("the sums over slices of matrices were never compiled", "Leave it out"): config.engine.tensor_parallel > 1,
        (f"layers with {attention} were never compiled", "Use auto, varlen, sdpa or eager"): attention
        not in _COMPILED_ATTENTION,
        ("varlen on CPU is a loop over documents, which cannot be compiled", "Use sdpa"): on_cpu
        and attention == "varlen",
    }
    reasons = next((reasons for reasons, holds in found.items() if holds), None)
    return None if reasons is None else Problem("not-compiled", COMPILE_KEY, *reasons)


def find_automatic_reason(config: Config, hf: HfValues) -> str | None:
    """Return why `auto` compiles nothing on whatever GPU the run gets; None if that depends on its length."""
    problem = find_compile_problem(config, hf)
    if config.cluster.gpus_per_worker == 0:
        return "on CPUs little is gained"
    if config.run.deterministic:
        return "run.deterministic: kernels are chosen by measured time, and another one rounds differently"
    return None if problem is None else problem.what


def choose_compilation(
    config: Config,
    hf: HfValues,
    device_type: str,
    seconds: float | None,
    missing: str | None,
    *,
    begun: bool | None,
) -> ResolvedValue:
    """Choose `true` or `false` for a run that computes for about `seconds`, None if that is unknown.

    `missing` = what some worker's machine lacks to compile. `begun` = what the checkpoint was computed with, which
    stays where it can, because compiled layers round differently; None without a checkpoint.
    """
    if device_type == "cpu":
        reason: str | None = "on CPUs little is gained"
    else:
        reason = find_automatic_reason(config, hf) or missing
    if reason is None and begun is not None:
        return ResolvedValue(COMPILE_KEY, "true" if begun else "false", "as the run has begun")
    if reason is None and seconds is None:
        reason = "the speed of this GPU is unknown, and so is the gain"
    if reason is None and seconds is not None and seconds < _LEAST_SECONDS:
        reason = f"about {max(seconds / 60, 1):.0f} minutes of computing do not win back the time of compiling"
    if reason is not None:
        return ResolvedValue(COMPILE_KEY, "false", reason)
    assert seconds is not None
    return ResolvedValue(COMPILE_KEY, "true", f"about {seconds / 3600:.3g} hours of computing win back the compilation")


def estimate_run_seconds(flops: float, devices: int, peak_flops: float | None) -> float | None:
    """Estimate the seconds that devices of a published peak compute, at 0.4 of it."""
    return None if peak_flops is None else flops / (devices * peak_flops * _UTILISATION)
