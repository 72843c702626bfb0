"""TensorBoard on run directories: builds its command line and replaces this process with it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

from llm_training_toolkit.errors import ConfigError

_READERS = {"s3": "boto3", "gs": "gcsfs"}  # package with which TensorBoard reads each URI scheme


def show_in_tensorboard(where: str, host: str, port: int) -> NoReturn:
    """Replace this process with TensorBoard. Raises ConfigError if runs or the package for the URI are missing."""
    options = ["--logdir", find_log_directory(where), "--host", host, "--port", str(port)]
    if "://" in where:
        options += ["--load_fast", "false"]  # the fast loader reads local files only
        if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
            os.environ.setdefault("S3_ENDPOINT", endpoint)  # TensorBoard's variable for a store that is not Amazon's
    # -P: a module of the current folder, such as html.py, is not imported in place of Python's own.
    command = [sys.executable, "-P", "-m", "tensorboard.main", *options]
    os.execv(command[0], command)  # noqa: S606 - Ctrl-C and its exit code are TensorBoard's own


def find_log_directory(where: str) -> str:
    """Return TensorBoard's `--logdir`; it searches below for every run. Raises ConfigError as above."""
    protocol, found, _ = where.partition("://")
    if found:
        reader = _READERS.get(protocol)
        if reader is not None and importlib.util.find_spec(reader) is None:
            raise ConfigError(f"{where}: TensorBoard reads {protocol}:// with {reader}: pip install {reader}")
        return where
    path = Path(where).expanduser().absolute()
    if next(path.glob("**/events.out.tfevents.*"), None) is None:
        runs = sorted(found.parent.name for found in path.parent.glob("*/tb"))
        hint = f"; runs beside it: {', '.join(runs)}" if runs else ""
        raise ConfigError(f"{where}: no run has written anything for TensorBoard there{hint}")
    return str(path)
