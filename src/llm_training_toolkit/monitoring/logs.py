"""Log files of a run: messages of the driver and of each rank, with time and level, and the output of libraries.

Output of libraries is redirected below Python, so that the screen shows only our own.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llm_training_toolkit.config.uri import redact_text
from llm_training_toolkit.errors import ToolkitError
from llm_training_toolkit.runs.directory import RunDirectory

DRIVER_LOGGER = logging.getLogger("llm_training_toolkit.driver")
RANK_LOGGER = logging.getLogger("llm_training_toolkit.rank")
for _logger in (DRIVER_LOGGER, RANK_LOGGER):
    _logger.addHandler(logging.NullHandler())  # without a run nothing is printed
    _logger.setLevel(logging.INFO)
    _logger.propagate = False  # handlers of the root logger belong to libraries


class _RunLogHandler(logging.FileHandler):
    """Handler that drops messages a full disk refuses: the metrics warn of it, and training continues."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Drop the record."""


@contextmanager
def log_to_file(logger: logging.Logger, path: Path, origin: str) -> Iterator[None]:
    """Append the logger's messages to a file: time, level, origin (such as `attempt 1 rank 0`), text.

    Raises OSError if the file cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _RunLogHandler(path, encoding="utf-8", errors="replace")
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {origin}: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


@contextmanager
def log_driver(run: RunDirectory) -> Iterator[None]:
    """Log what the driver prints about a run to its logs/driver.log, and the error that ends it."""
    with log_to_file(DRIVER_LOGGER, run.driver_log_path, "driver"):
        DRIVER_LOGGER.info("command: %s", redact_text(" ".join(sys.argv)))
        try:
            yield
        except Exception as error:
            unexpected = None if isinstance(error, ToolkitError) else error  # with its traceback
            DRIVER_LOGGER.error("%s: %s", type(error).__name__, error, exc_info=unexpected)
            raise


_END = 16_384  # bytes read from the end of a log


def read_last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a log without blank ones; empty if it is missing."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]


_saved_descriptors: dict[int, int] = {}  # copies of standard output and error from before the first `redirect_output`


def redirect_output(path: Path) -> None:
    """Append standard output and error of this process, and of its future children, to a file."""
    for descriptor in (1, 2):
        if descriptor not in _saved_descriptors:
            _saved_descriptors[descriptor] = os.dup(descriptor)
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def restore_output() -> None:
    """Undo every `redirect_output`."""
    sys.stdout.flush()
    sys.stderr.flush()
    while _saved_descriptors:
        descriptor, saved = _saved_descriptors.popitem()
        os.dup2(saved, descriptor)
        os.close(saved)
