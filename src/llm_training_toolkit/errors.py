"""Exceptions of the toolkit with their exit codes. Raised everywhere; imports no other module.

ToolkitError is the base class of: ConfigError      invalid file or override, exit 2. PlanError        valid file,
impossible run, exit 2. DataError        document, source or token cache, exit 1. CheckpointError state that cannot be
used or saved, exit 1. TrainingError    failure of the training itself, exit 1. LaunchError      machines, Ray or a
process, exit 1.

A message states the place, the problem, the value and the remedy. The constructors take the message alone, so that
exceptions survive pickling by Ray. `problems` holds the same as data, with stable codes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Self

_OS_ERROR_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space, or name another place (run.dir, data.cache)",
    errno.EDQUOT: "the quota is used up: free some space, or name another place (run.dir, data.cache)",
    errno.EFBIG: "the file may not grow further: raise the limit (ulimit -f)",
    errno.EIO: "the disk or the connection to it fails: the system's log (dmesg) may say more",
    errno.EROFS: "the file system is mounted read-only: remount it, or name another place (run.dir, data.cache)",
    errno.EACCES: "change its permissions, or name another place (run.dir, data.cache)",
    errno.ESTALE: "the connection to the file server was lost: mount it again",
}


@dataclass(frozen=True)
class Problem:
    """Reason why a run cannot start as configured."""

    code: str
    """Stable name, for scripts and tests; the words may change."""
    where: str
    """Dotted key of the configuration."""
    what: str
    """Description of the problem, with the value."""
    fix: str
    """Suggested change."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.fix}"


class ToolkitError(Exception):
    """Base class of expected errors; the user sees the message."""

    exit_code = 1
    code: ClassVar[str] = "failed"
    """Code of the one problem of an error that lists none."""
    _problems: tuple[Problem, ...] = ()

    @classmethod
    def from_problems(cls, message: str, problems: Iterable[Problem]) -> Self:
        """Return an error with its problems as data; they survive pickling, too."""
        error = cls(message)
        error._problems = tuple(problems)
        return error

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Every problem, at least one: an error without a list has its message as one problem."""
        return self._problems or (Problem(self.code, "", str(self), ""),)


class ConfigError(ToolkitError):
    """The configuration file or an override is invalid."""

    exit_code = 2
    code = "invalid-configuration"


class PlanError(ToolkitError):
    """The configuration is valid, but the run it describes is impossible."""

    exit_code = 2
    code = "impossible-run"


class DataError(ToolkitError):
    """A document, a source or the prepared tokens cannot be used."""

    code = "unusable-data"


class CheckpointError(ToolkitError):
    """A state cannot be saved, or used for this run."""

    code = "unusable-checkpoint"


class TrainingError(ToolkitError):
    """Training cannot continue, for example because of a non-finite loss."""

    code = "training-failed"


class LaunchError(ToolkitError):
    """The machines, Ray or a worker process failed."""

    code = "launch-failed"


def format_os_error(error: OSError) -> str:
    """Format an error of the operating system as one sentence: file, problem, remedy."""
    if error.errno is None:  # made by a library, with a text of its own
        return str(error).strip().rpartition("\n")[2] or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    remedy = _OS_ERROR_REMEDIES.get(error.errno, "remove the cause")
    return f"{where}{os.strerror(error.errno)}: {remedy}, then give the same command again"
