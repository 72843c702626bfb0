"""Checkpoints made of fragments: complete or absent, loadable by any number of ranks under any ZeRO stage."""

from llm_training_toolkit.checkpoint.base_weights import (
    BaseWeights,
    check_base_matches,
    find_weight_files,
    find_weights_directory,
    read_base_weights,
)
from llm_training_toolkit.checkpoint.manifest import FileEntry, Manifest, UnknownFormatError, read_manifest
from llm_training_toolkit.checkpoint.reader import (
    CheckpointReader,
    find_latest_checkpoint,
    list_complete_checkpoints,
)
from llm_training_toolkit.checkpoint.retention import (
    RetentionPolicy,
    apply_retention_policy,
    delete_incomplete_checkpoints,
    held_out_losses,
    select_kept_steps,
)
from llm_training_toolkit.checkpoint.writer import AsyncWrite, ParameterShard, allocate_host_buffer, commit_checkpoint

__all__ = [
    "AsyncWrite",
    "BaseWeights",
    "CheckpointReader",
    "FileEntry",
    "Manifest",
    "ParameterShard",
    "RetentionPolicy",
    "UnknownFormatError",
    "allocate_host_buffer",
    "apply_retention_policy",
    "check_base_matches",
    "commit_checkpoint",
    "delete_incomplete_checkpoints",
    "find_latest_checkpoint",
    "find_weight_files",
    "find_weights_directory",
    "held_out_losses",
    "list_complete_checkpoints",
    "read_base_weights",
    "read_manifest",
    "select_kept_steps",
]
