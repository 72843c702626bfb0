"""Models: construction, initial weights, loss. `lora` is left out here, because it imports peft."""

from llm_training_toolkit.models.build import build_model, check_parameter_count, count_parameters
from llm_training_toolkit.models.check_weights import check_pretrained_weights
from llm_training_toolkit.models.init_weights import initialize_weights, resize_embeddings
from llm_training_toolkit.models.loss import LossModule

__all__ = [
    "LossModule",
    "build_model",
    "check_parameter_count",
    "check_pretrained_weights",
    "count_parameters",
    "initialize_weights",
    "resize_embeddings",
]
