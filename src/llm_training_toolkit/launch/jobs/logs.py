"""The log of a job, followed to its end, over connections that break."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from aiohttp import ClientError
from requests import RequestException

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.request import EXIT_CODES
from llm_training_toolkit.monitoring.console import Console

_RETRY_SECONDS = 2.0
"""Seconds between two tries to reach a cluster that has stopped answering."""
_RECONNECT_TIMEOUT_SECONDS = 300.0
"""Seconds after which it is given up: a head that starts anew takes one or two minutes."""
_POLL_SECONDS = 0.5
_CONNECTION_ERRORS = (ClientError, RequestException, OSError, RuntimeError, TimeoutError)
"""What Ray's client raises when a connection breaks: RuntimeError where it closes while the job goes on."""
_UNKNOWN_JOB_TEXT = "does not exist"
T = TypeVar("T")


class JobHandle:
    """A job as it looks from here: what it prints, and how it ends."""

    def __init__(self, client: Any, job: str, address: str, console: Console) -> None:  # noqa: ANN401 - Ray has no types
        self._client, self._job, self._address, self._console = client, job, address, console
        self._shown, self._line = 0, ""

    def follow_logs(self) -> int:
        """Show what the job prints until it ends; its driver's exit code: 0 finished, 75 stopped.

        Raises LaunchError when the cluster does not answer for long, or knows the job no more.
        """
        while not self._retry_until_reachable(self._read_to_end):
            time.sleep(_POLL_SECONDS)
        if self._line:
            self._console.print_line(self._line)
        return self.wait_for_exit()

    def wait_for_exit(self) -> int:
        """Wait for the job's end without showing anything; its exit code. Raises as `follow` does."""
        info = self._retry_until_reachable(lambda: self._client.get_job_info(self._job))
        while not info.status.is_terminal():
            time.sleep(_POLL_SECONDS)
            info = self._retry_until_reachable(lambda: self._client.get_job_info(self._job))
        if info.status.value == "SUCCEEDED":
            return 0
        if info.status.value == "STOPPED":
            return EXIT_CODES["stopped"]
        if info.driver_exit_code is None:  # it never came so far as to print a cause
            self._console.print_line(f"error: job {self._job} failed: {info.message}")
        return int(info.driver_exit_code or 1)

    def request_stop(self) -> None:
        """Ask the job to stop with a checkpoint."""
        self._retry_until_reachable(lambda: self._client.stop_job(self._job))

    def _read_to_end(self) -> bool:
        """Show what the job prints until the connection ends; whether the job has ended too."""
        self._client.get_job_info(self._job)  # a job that is not known says so here, not when its log is asked for
        asyncio.run(self._stream_logs())
        return bool(self._client.get_job_info(self._job).status.is_terminal())

    async def _stream_logs(self) -> None:
        """A connection begins with the log's first line: what was shown before is passed over."""
        passed = 0
        async for text in self._client.tail_job_logs(self._job):
            new = text[max(0, self._shown - passed) :]
            passed += len(text)
            self._shown = max(self._shown, passed)
            *lines, self._line = (self._line + new).split("\n")
            for line in lines:
                self._console.print_line(line)

    def _retry_until_reachable(self, ask: Callable[[], T]) -> T:
        """Ask until the cluster answers."""
        lost = 0.0
        while True:
            try:
                return ask()
            except _CONNECTION_ERRORS as error:
                if _UNKNOWN_JOB_TEXT in str(error):
                    raise LaunchError(
                        f"{self._address} knows no job {self._job} any more: its head has started anew. "
                        "The same `ltt submit` goes on from the newest checkpoint"
                    ) from error
                if lost and time.monotonic() - lost > _RECONNECT_TIMEOUT_SECONDS:
                    raise LaunchError(
                        f"{self._address} has not answered for {_RECONNECT_TIMEOUT_SECONDS / 60:g} minutes. If "
                        "the cluster lives, "
                        f"the job goes on: `ltt jobs logs {self._job} --address {self._address}` follows it again. If "
                        "not, the same `ltt submit` on a new one goes on from the newest checkpoint"
                    ) from error
                if not lost:
                    lost = time.monotonic()
                    self._console.print_line(
                        f"the connection to {self._address} is lost; trying again every {_RETRY_SECONDS:g} s"
                    )
            time.sleep(_RETRY_SECONDS)
