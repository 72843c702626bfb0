"""Export: a checkpoint as a directory that plain `transformers` and `peft` load."""

from llm_training_toolkit.export.directory import Beside, appearing, exported_from, remove_export, write_beside
from llm_training_toolkit.export.verify import check_whole
from llm_training_toolkit.export.weights import CheckpointWeights, ModelWeights, Weights, write_model

__all__ = [
    "Beside",
    "CheckpointWeights",
    "ModelWeights",
    "Weights",
    "appearing",
    "check_whole",
    "exported_from",
    "remove_export",
    "write_beside",
    "write_model",
]
