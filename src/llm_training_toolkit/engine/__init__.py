"""DeepSpeed engine: optimizer steps and parameter fragments. Only this folder imports DeepSpeed."""

from llm_training_toolkit.engine.deepspeed_init import gathered_parameter, prepare_deepspeed, zero3_init
from llm_training_toolkit.engine.engine import Engine
from llm_training_toolkit.engine.fragments import Fragment

__all__ = ["Engine", "Fragment", "gathered_parameter", "prepare_deepspeed", "zero3_init"]
