"""Runs whose directory lies in an object store; of no concern to those on a disk."""

from llm_training_toolkit.runs.storage.open import hold_stored, opened, reached, refusal_of, runs_at, taking_part
from llm_training_toolkit.runs.storage.s3_client import StorageError
from llm_training_toolkit.runs.storage.storage import Storage, storage_of

__all__ = [
    "Storage",
    "StorageError",
    "hold_stored",
    "opened",
    "reached",
    "refusal_of",
    "runs_at",
    "storage_of",
    "taking_part",
]
