"""Data type of saved weights, by their config.json: what training cannot load, and what it rounds."""

from __future__ import annotations

from collections.abc import Iterator

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.families import read_quantization, read_saved_config, read_saved_dtype
from llm_training_toolkit.plan.problem import Problem

# Bits of a mantissa, which tell whether a conversion rounds.
_MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}
_PRECISION_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def find_saved_weights_problems(config: Config) -> Iterator[Problem]:
    """Find weights that are saved quantized: training starts from whole ones."""
    model = config.model
    found = None if model.path is None else read_saved_config(model.path, model.revision)
    method = None if found is None else read_quantization(found)
    if method is not None:
        what = f"the weights in {model.path} are quantized ({method})"
        fix = "Give the weights they were made from, in bf16; model.lora.quantize = nf4 makes them 4-bit while training"
        yield Problem("quantized-weights", "model.path", what, fix)


def collect_dtype_notes(config: Config) -> Iterator[str]:
    """Note weights that the precision of the run rounds when they are loaded."""
    model, precision = config.model, str(config.train.precision)
    found = None if model.path is None else read_saved_config(model.path, model.revision)
    saved = None if found is None else read_saved_dtype(found)
    loaded = _PRECISION_DTYPES[precision]
    if saved in _MANTISSA_BITS and _MANTISSA_BITS[saved] > _MANTISSA_BITS[loaded]:
        keep = "" if saved == "float64" else " train.precision = fp32 keeps them."
        yield f"Weights saved in {saved} are rounded to {loaded} when loaded, and exported in it.{keep}"
