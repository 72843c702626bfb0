"""Plan of a run in an object store, read before the run is opened."""

from __future__ import annotations

from concurrent.futures import TimeoutError as LateError
from contextlib import suppress
from pathlib import Path

from llm_training_toolkit import families
from llm_training_toolkit.config import Config
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.runs.storage.open import get_run_location
from llm_training_toolkit.runs.storage.s3_client import S3Client
from llm_training_toolkit.setup.daemon_call import PLAN_PATIENCE_SECONDS, start_daemon_call


def recall_stored_plan(config: Config) -> Config:
    """Return the configuration with the plan that its run in a store began with, if the store gives it in 12 seconds.

    A plan needs no store: opening the run is what reports one that refuses or does not answer.
    """
    given = config.model.path or config.model.init_from
    if not is_uri(config.run.dir) or given is None or Path(given).expanduser().exists() or config.begun_plan:
        return config

    def recall() -> Config:
        store = S3Client(get_run_location(config))

        def read_file(name: str) -> bytes:
            found = store.get_object(name)
            if found is None:
                raise FileNotFoundError(name)
            return found.body

        return families.recall_plan_files(config, read_file)

    with suppress(OSError, LateError):
        recalled = start_daemon_call(recall, "recall-plan").result(timeout=PLAN_PATIENCE_SECONDS)
        return config if families.is_plan_assumed(recalled.begun_plan) else recalled
    return config
