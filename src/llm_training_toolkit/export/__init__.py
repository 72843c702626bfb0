"""Export of a checkpoint to a directory that `transformers` and `peft` load."""

from llm_training_toolkit.export.directory import (
    ORIGIN_FILE,
    ModelFiles,
    atomic_export_dir,
    read_source_checkpoint_name,
    read_source_run_name,
    remove_export,
    write_model_files,
)
from llm_training_toolkit.export.verify import check_full_model
from llm_training_toolkit.export.weights import CheckpointWeights, ModelWeights, WeightSource, write_model

__all__ = [
    "ORIGIN_FILE",
    "CheckpointWeights",
    "ModelFiles",
    "ModelWeights",
    "WeightSource",
    "atomic_export_dir",
    "check_full_model",
    "read_source_checkpoint_name",
    "read_source_run_name",
    "remove_export",
    "write_model",
    "write_model_files",
]
