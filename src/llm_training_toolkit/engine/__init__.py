"""The only place that knows DeepSpeed: it takes the steps and gives and takes fragments."""

from llm_training_toolkit.engine.deepspeed_init import gathered_parameter, prepare_deepspeed, zero3_init
from llm_training_toolkit.engine.engine import Engine
from llm_training_toolkit.engine.fragments import Fragment

__all__ = ["Engine", "Fragment", "gathered_parameter", "prepare_deepspeed", "zero3_init"]
