"""Log of a Ray job, followed to its end across broken connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, TypeVar

from aiohttp import ClientError
from requests import RequestException

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.request import EXIT_CODES
from llm_training_toolkit.monitoring.console import Console

_RETRY_SECONDS = 2.0  # between attempts to reach a cluster that has stopped answering
_RECONNECT_TIMEOUT_SECONDS = 300.0  # a head takes one or two minutes to restart
_POLL_SECONDS = 0.5
# Raised by Ray's client when a connection breaks; RuntimeError if it closes while the job continues.
_CONNECTION_ERRORS = (ClientError, RequestException, OSError, RuntimeError, TimeoutError)
_UNKNOWN_JOB_TEXT = "does not exist"
T = TypeVar("T")


class JobHandle:
    """Handle of a job: its log, its exit code, and stopping it."""

    def __init__(self, client: Any, job: str, address: str, console: Console) -> None:  # noqa: ANN401 - Ray has no types
        self._client, self._job, self._address, self._console = client, job, address, console
        self._shown, self._line = 0, ""

    def follow_logs(self) -> int:
        """Print the job's log until it ends. Return its driver's exit code: 0 finished, 75 stopped.

        Raises LaunchError if the cluster stays unreachable or has lost the job.
        """
        while not self._retry_until_reachable(self._read_to_end):
            time.sleep(_POLL_SECONDS)
        if self._line:
            self._console.print_line(self._line)
        return self.wait_for_exit()

    def wait_for_exit(self) -> int:
        """Wait for the job's end without printing its log. Return its exit code. Raises as `follow_logs` does."""
        info = self._retry_until_reachable(lambda: self._client.get_job_info(self._job))
        while not info.status.is_terminal():
            time.sleep(_POLL_SECONDS)
            info = self._retry_until_reachable(lambda: self._client.get_job_info(self._job))
        if info.status.value == "SUCCEEDED":
            return 0
        if info.status.value == "STOPPED":
            return EXIT_CODES["stopped"]
        if info.driver_exit_code is None:  # it ended before it could print a cause
            self._console.print_line(f"error: job {self._job} failed: {info.message}")
        return int(info.driver_exit_code or 1)

    def request_stop(self) -> None:
        """Ask the job to stop with a checkpoint."""
        self._retry_until_reachable(lambda: self._client.stop_job(self._job))

    def _read_to_end(self) -> bool:
        """Print the log until the connection ends. Return whether the job has ended too."""
        self._client.get_job_info(self._job)  # an unknown job fails here, not in the stream of its log
        asyncio.run(self._stream_logs())
        return bool(self._client.get_job_info(self._job).status.is_terminal())

    async def _stream_logs(self) -> None:
        """Print the log. Each connection begins with its first line, so text already shown is skipped."""
        passed = 0
        async with aclosing(self._client.tail_job_logs(self._job)) as pieces:  # Ctrl-C would leave its tasks pending
            async for text in pieces:
                new = text[max(0, self._shown - passed) :]
                passed += len(text)
                self._shown = max(self._shown, passed)
                *lines, self._line = (self._line + new).split("\n")
                for line in lines:
                    self._console.print_line(line)

    def _retry_until_reachable(self, ask: Callable[[], T]) -> T:
        """Call `ask` until the cluster answers. Raises LaunchError as `follow_logs` does."""
        lost = 0.0
        while True:
            try:
                return ask()
            except _CONNECTION_ERRORS as error:
                if _UNKNOWN_JOB_TEXT in str(error):
                    raise LaunchError(
                        f"{self._address} knows no job {self._job} any more: its head has started anew. "
                        "The same `ltt submit` resumes from the latest checkpoint"
                    ) from error
                if lost and time.monotonic() - lost > _RECONNECT_TIMEOUT_SECONDS:
                    raise LaunchError(
                        f"{self._address} has not answered for {_RECONNECT_TIMEOUT_SECONDS / 60:g} minutes. If "
                        f"the cluster lives, the job continues: `ltt jobs logs {self._job} --address {self._address}` "
                        "follows it. If not, the same `ltt submit` on a new one resumes from the latest checkpoint"
                    ) from error
                if not lost:
                    lost = time.monotonic()
                    self._console.print_line(
                        f"the connection to {self._address} is lost; trying again every {_RETRY_SECONDS:g} s"
                    )
            time.sleep(_RETRY_SECONDS)
