"""Checkpoints as fragments: complete or absent, loadable by any number of ranks under any ZeRO stage."""

from llm_training_toolkit.checkpoint.manifest import FileEntry, Manifest, UnknownFormatError
from llm_training_toolkit.checkpoint.reading import Checkpoint, complete, newest, set_aside
from llm_training_toolkit.checkpoint.retention import clean, kept
from llm_training_toolkit.checkpoint.writing import Piece, Writing, finish

__all__ = [
    "Checkpoint",
    "FileEntry",
    "Manifest",
    "Piece",
    "UnknownFormatError",
    "Writing",
    "clean",
    "complete",
    "finish",
    "kept",
    "newest",
    "set_aside",
]
