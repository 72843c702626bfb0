"""Storage of runs: a local disk or an object store."""

from llm_training_toolkit.runs.storage.open import (
    find_store_problem,
    lock_stored_run,
    open_path,
    open_runs_directory,
    open_worker,
    storage_errors,
)
from llm_training_toolkit.runs.storage.s3_client import StorageError
from llm_training_toolkit.runs.storage.storage import Storage, find_storage

__all__ = [
    "Storage",
    "StorageError",
    "find_storage",
    "find_store_problem",
    "lock_stored_run",
    "open_path",
    "open_runs_directory",
    "open_worker",
    "storage_errors",
]
