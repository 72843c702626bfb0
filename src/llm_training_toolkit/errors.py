"""Exceptions of the toolkit with their exit codes. Raised everywhere; imports no other module.

ToolkitError is the base class of:
    ConfigError      invalid file or override, exit 2.
    PlanError        valid file, impossible run, exit 2.
    DataError        document, source or token cache, exit 1.
    CheckpointError  saved state that cannot be used, or cannot be saved, exit 1.
    TrainingError    failure of the training itself, exit 1.
    LaunchError      machines, Ray or a process, exit 1.

A message states the place, the problem, the value and the remedy. The constructors take the message alone, so that
exceptions survive pickling by Ray.
"""

import errno
import os

_OS_ERROR_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space, or name another place (run.dir, data.cache)",
    errno.EDQUOT: "the quota is used up: free some space, or name another place (run.dir, data.cache)",
    errno.EFBIG: "the file may not grow further: raise the limit (ulimit -f)",
    errno.EIO: "the disk or the connection to it fails: the system's log (dmesg) may say more",
    errno.EROFS: "the file system is mounted read-only: remount it, or name another place (run.dir, data.cache)",
    errno.EACCES: "change its permissions, or name another place (run.dir, data.cache)",
    errno.ESTALE: "the connection to the file server was lost: mount it again",
}


class ToolkitError(Exception):
    """Base class of expected errors; the user sees the message."""

    exit_code = 1


class ConfigError(ToolkitError):
    """The configuration file or an override is invalid."""

    exit_code = 2


class PlanError(ToolkitError):
    """The configuration is valid, but the run it describes is impossible."""

    exit_code = 2


class DataError(ToolkitError):
    """A document, a source or the prepared tokens cannot be used."""


class CheckpointError(ToolkitError):
    """A saved state cannot be used for this run, or could not be saved."""


class TrainingError(ToolkitError):
    """Training cannot continue, for example because of a non-finite loss."""


class LaunchError(ToolkitError):
    """The machines, Ray or a worker process failed."""


def format_os_error(error: OSError) -> str:
    """Format an error of the operating system as one sentence: file, problem, remedy."""
    if error.errno is None:  # made by a library, with a text of its own
        return str(error).strip().rpartition("\n")[2] or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    remedy = _OS_ERROR_REMEDIES.get(error.errno, "remove the cause")
    return f"{where}{os.strerror(error.errno)}: {remedy}, then give the same command again"
