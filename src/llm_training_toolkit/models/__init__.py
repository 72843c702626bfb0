"""Models: building them, their first weights, their loss. `adapters` is imported by those who need peft."""

from llm_training_toolkit.models.build import build_model, check_size
from llm_training_toolkit.models.check_weights import check_weights
from llm_training_toolkit.models.init_weights import grow_vocabulary, initialize
from llm_training_toolkit.models.loss import LossModule

__all__ = ["LossModule", "build_model", "check_size", "check_weights", "grow_vocabulary", "initialize"]
