"""What can go wrong, as people meet it. Called from everywhere, calls nothing.

    ToolkitError
    ├── ConfigError      the file or an override is wrong                  exit 2
    ├── PlanError        the file is readable, the run it asks for is not  exit 2
    ├── DataError        a document, a source or the token cache           exit 1
    ├── CheckpointError  something saved cannot be used, or cannot be saved exit 1
    ├── TrainingError    the training itself went wrong                    exit 1
    └── LaunchError      the machines, Ray or a process                    exit 1

A message says where, what, the value and what to do. The classes take the message alone, so that
they survive pickling on their way through Ray.
"""


class ToolkitError(Exception):
    """Anything the toolkit reports on purpose; its text is meant to be read by the person at the keyboard."""

    exit_code = 1


class ConfigError(ToolkitError):
    """The configuration file or an override cannot be accepted."""

    exit_code = 2


class PlanError(ToolkitError):
    """The configuration is well formed, but the run it describes is impossible."""

    exit_code = 2


class DataError(ToolkitError):
    """A document, a source or the prepared tokens cannot be used."""


class CheckpointError(ToolkitError):
    """Something saved cannot be used for this run, or could not be saved."""


class TrainingError(ToolkitError):
    """Training cannot go on, for example because the loss is not finite."""


class LaunchError(ToolkitError):
    """The machines, Ray or a worker process did not do what was asked."""
