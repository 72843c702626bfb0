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
