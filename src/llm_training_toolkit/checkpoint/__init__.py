"""Checkpoints as fragments: complete or absent, loadable by any number of ranks under any ZeRO stage."""

from llm_training_toolkit.checkpoint.base_weights import Base, base_of, refuse_other_base, weight_files
from llm_training_toolkit.checkpoint.manifest import FileEntry, Manifest, UnknownFormatError, read_manifest
from llm_training_toolkit.checkpoint.reader import Checkpoint, complete, newest, set_aside
from llm_training_toolkit.checkpoint.retention import Rule, clean, clear_unfinished, held_out_losses, kept
from llm_training_toolkit.checkpoint.writer import Piece, Writing, finish, memory_for

__all__ = [
    "Base",
    "Checkpoint",
    "FileEntry",
    "Manifest",
    "Piece",
    "Rule",
    "UnknownFormatError",
    "Writing",
    "base_of",
    "clean",
    "clear_unfinished",
    "complete",
    "finish",
    "held_out_losses",
    "kept",
    "memory_for",
    "newest",
    "read_manifest",
    "refuse_other_base",
    "set_aside",
    "weight_files",
]
