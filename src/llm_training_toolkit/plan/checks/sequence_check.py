"""Problems of `engine.sequence_parallel`: sizes that its ranks do not divide, and unproved combinations."""

from __future__ import annotations

from collections.abc import Iterator

from llm_training_toolkit import families
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.families import HfValues, ModelDims, ModelSize
from llm_training_toolkit.plan.problem import Problem, format_plural

SEQUENCE_PARALLEL_KEY = "engine.sequence_parallel"


def find_sequence_problems(config: Config, size: ModelSize, hf: HfValues, sizes: tuple[int, int]) -> Iterator[Problem]:
    """Find reasons against ranks that share sequences; `sizes` = (fewest, most) ranks of the run."""
    each = config.engine.sequence_parallel
    if each == 1:
        return
    dims = families.read_model_dims(hf)
    yield from _find_uneven_problems(config, size, dims, sizes)
    yield from _find_unsupported_problems(config, size, dims)


def _find_uneven_problems(
    config: Config, size: ModelSize, dims: ModelDims, sizes: tuple[int, int]
) -> Iterator[Problem]:
    """Find workers, heads and tokens that the ranks of a replica do not divide."""
    each, length = config.engine.sequence_parallel, config.data.sequence_length
    uneven = [workers for workers in dict.fromkeys(sizes) if workers % each]
    if uneven:
        wrong = " and ".join(format_plural(workers, "worker") for workers in uneven)
        fix = f"Use a multiple of {each} workers, or another engine.sequence_parallel"
        yield Problem("sequence-parallel-workers", "cluster.workers", f"{each} do not divide {wrong}", fix)
    if dims.heads % each or dims.kv_heads % each:
        what = f"{each} do not divide the {dims.heads} query heads and {dims.kv_heads} key-value heads of {size.name}"
        possible = [
            number for number in range(1, dims.kv_heads + 1) if not (dims.heads % number or dims.kv_heads % number)
        ]
        fix = f"Use {' or '.join(map(str, possible))}"
        yield Problem("sequence-parallel-heads", SEQUENCE_PARALLEL_KEY, what, fix)
    if length % each:
        fix = f"Use {length // each * each} or {-(-length // each) * each}"
        yield Problem("sequence-parallel-length", "data.sequence_length", f"{each} do not divide {length}", fix)


def _find_unsupported_problems(config: Config, size: ModelSize, dims: ModelDims) -> Iterator[Problem]:
    """Find settings that take whole sequences on one rank, or were not proved; `auto` ones are still open."""
    attention, lora = config.model.attn_implementation, config.model.lora
    if dims.linear_attention is not None:
        what = f"{size.name} has linear attention, which runs along the tokens of a whole sequence"
        fix = "Set it to 1, or use a model with attention alone"
        yield Problem("sequence-parallel-linear-attention", SEQUENCE_PARALLEL_KEY, what, fix)
    if attention not in {"auto", "varlen"}:
        what = f"{attention} has no exchange of tokens and heads around it"
        yield Problem(
            "sequence-parallel-attention", "model.attn_implementation", what, "Use varlen, or leave it to auto"
        )
    if attention == "auto" and config.run.deterministic and config.cluster.gpus_per_worker == 1:
        what = f"attention of {SEQUENCE_PARALLEL_KEY} is varlen, which is not known to repeat every bit on GPUs"
        fix = "Set it to false, or set model.attn_implementation to varlen, which is then used unproved"
        yield Problem("sequence-parallel-deterministic", "run.deterministic", what, fix)
    if config.train.router_balance is not None:
        what = "the balance loss is of whole sequences, and a worker has a slice of each"
        yield Problem("sequence-parallel-router-balance", "train.router_balance", what, "Remove it")
    if lora is not None and lora.dropout > 0:
        what = f"dropout of {lora.dropout:g} draws one mask for a whole sequence, and a worker has a slice of each"
        yield Problem("sequence-parallel-dropout", "model.lora.dropout", what, "Set it to 0")
    if lora is not None and lora.quantize is not None:
        what = f"its gradients were never compared on {lora.quantize} weights, which need a GPU"
        yield Problem(
            "sequence-parallel-quantize", "model.lora.quantize", what, f"Remove it, or {SEQUENCE_PARALLEL_KEY}"
        )
