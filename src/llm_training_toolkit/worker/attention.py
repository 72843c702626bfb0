"""Resolution of `model.attn_implementation: auto` on the ranks, by their device."""

from __future__ import annotations

from dataclasses import replace

from llm_training_toolkit import families
from llm_training_toolkit.config import Config
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import NoteEvent
from llm_training_toolkit.models.attention import has_flash_kernels
from llm_training_toolkit.plan import choose_attention, with_attention
from llm_training_toolkit.plan.auto import ResolvedValue
from llm_training_toolkit.worker.spec import WorkerSpec


def resolve_attention(spec: WorkerSpec, context: RunContext) -> tuple[WorkerSpec, tuple[str, ...]]:
    """Return the spec with an implementation of attention instead of `auto`, and the reason as a note for the plan.

    The precision must be resolved before. Rank 0 decides for all, because another kernel rounds otherwise. Collective.
    """
    given = spec.config.model.attn_implementation
    chosen = context.broadcast_object(given if given != "auto" else _choose(spec.config, context))
    if not isinstance(chosen, ResolvedValue):
        return replace(spec, config=with_attention(spec.config, chosen)), ()
    if context.is_rank_zero and context.device.type != "cpu":
        context.report(NoteEvent(str(chosen)))
    return replace(spec, config=with_attention(spec.config, str(chosen.value))), (str(chosen),)


def _choose(config: Config, context: RunContext) -> ResolvedValue:
    return choose_attention(
        str(config.train.precision),
        families.read_model_dims(families.resolve_hf_config(config)).head_dim,
        context.device.type,
        has_flash=has_flash_kernels(context.device),
        deterministic=config.run.deterministic,
        sequence_parallel=config.engine.sequence_parallel,
    )
