"""Whether workers that failed may start again; Ray Train's controller asks."""

from __future__ import annotations

from typing import Any

import ray
from ray.train import UserCallback

from llm_training_toolkit.errors import LaunchError


class Restarts(UserCallback):
    """Decides whether Ray may start the workers again: not for an error they would meet again, nor for ever.

    Runs in Ray Train's controller, where an exception from a callback ends the run without a retry.
    Shutting Ray down under a running `fit` would end it too, but now and then with a segmentation fault.
    """

    def __init__(self, line: Any, allowed: int) -> None:  # noqa: ANN401
        self._line, self._allowed = line, allowed

    def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:  # noqa: ANN401, ARG002
        """Raise LaunchError when the run must end."""
        rank, error = next(iter(worker_exceptions.items()))
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if text := ray.get(self._line.verdict.remote(self._allowed, f"rank {rank} failed: {lines[-1]}")):
            raise LaunchError(text)
