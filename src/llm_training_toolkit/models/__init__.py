"""Models: building them, their first weights, their loss. `adapters` is imported by those who need peft."""

from llm_training_toolkit.models.build import build_model, check_size
from llm_training_toolkit.models.initial import initialize
from llm_training_toolkit.models.loss import LossModule
from llm_training_toolkit.models.vocabulary import grow_vocabulary
from llm_training_toolkit.models.weights import check_weights

__all__ = ["LossModule", "build_model", "check_size", "check_weights", "grow_vocabulary", "initialize"]
