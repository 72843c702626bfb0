"""Request, result and exit codes of `ltt train`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.uri import is_uri, redact_text
from llm_training_toolkit.errors import ToolkitError, format_os_error
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.storage.open import get_run_location

TrainResultStatus = Literal["finished", "stopped"]
# 75 = stopped, the same command resumes: Slurm's requeue and a Kubernetes back-off test for it.
EXIT_CODES: dict[TrainResultStatus, int] = {"finished": 0, "stopped": 75}


@dataclass(frozen=True)
class TrainRequest:
    """Command-line arguments of `ltt train`."""

    config: Path
    overrides: Sequence[str] = ()
    accept: Sequence[str] = ()
    extend: bool = False


@dataclass(frozen=True)
class TrainResult:
    """State of a run when `ltt train` returns."""

    run: str
    """Path or URI of the run directory."""
    step: int | None
    """Newest step; None for a command that was interrupted before it knew the step."""
    status: TrainResultStatus
    checkpoint: str | None
    """Newest checkpoint."""

    def to_json(self) -> dict[str, Any]:
        """Return the output of `ltt train --json`, a public contract."""
        return asdict(self)


def build_interrupted_json(config: Config | None) -> dict[str, Any]:
    """Return the output of `ltt train --json` for a command that was interrupted outside the loop.

    `config` is None if it was interrupted before the configuration was read. A store is left alone: its answer may
    take longer than the grace period of a stop signal.
    """
    if config is None:
        return {"run": None, "step": None, "status": "stopped", "checkpoint": None}
    from llm_training_toolkit.checkpoint import find_latest_checkpoint

    location = get_run_location(config)
    latest = None if is_uri(location) else find_latest_checkpoint(RunDirectory(Path(location)).checkpoints_dir)
    return TrainResult(location, None, "stopped", None if latest is None else str(latest)).to_json()


def build_failure_json(error: Exception) -> dict[str, Any]:
    """Return the output of `ltt train --json` for a failed run, a public contract."""
    message = format_os_error(error) if isinstance(error, OSError) else str(error)
    known = error if isinstance(error, ToolkitError) else ToolkitError(message)
    return {
        "run": None,
        "step": None,
        "status": "failed",
        "checkpoint": None,
        "error": message,
        "kind": type(known).__name__,
        "problems": [asdict(problem) for problem in known.problems],
    }


def format_next_steps(outcome: TrainResult, request: TrainRequest, config: Config) -> list[str]:
    """Return suggested next commands, ready to paste apart from addresses, which are redacted.

    Neither the file of the configuration nor the current directory need exist any more: training may take weeks.
    """
    if outcome.status == "stopped":
        return [f"stopped at step {outcome.step:,} with a checkpoint: the same command resumes from there"]
    run = outcome.run if is_uri(outcome.run) else _find_relative_path(outcome.run)
    ltt = "ltt" if shutil.which("ltt") else _find_relative_path(str(Path(sys.executable).parent / "ltt"))
    lines = ["", "next:"]
    if config.export.at_end:
        exported = shlex.quote(f"{run}/export")
        lines += [f"  {ltt} generate {exported} {options}" for options in _suggest_prompts(config)]
        lines.append(f"  {ltt} serve {exported}")
    if config.export.at_end and config.model.lora is not None:
        lines.append(f"  {ltt} export {shlex.quote(run)} --merge")
    lines.append(f"  {ltt} tensorboard {shlex.quote(run.rpartition('/')[0] or '.')}")
    lines.append(f"  {ltt} train {_format_longer_run(request, config)} --extend")
    return lines


def _suggest_prompts(config: Config) -> Iterator[str]:
    """Yield options of `ltt generate` that ask for what the run has learnt."""
    formats = {source.format for source in config.data.sources}
    if "chat" in formats:
        yield "--chat --prompt 'What does zip do?'"
    if formats != {"chat"}:
        yield "--prompt 'def main():'"
    if any(source.fim is not None for source in config.data.sources):
        yield "--prompt 'def add(a, b):' --suffix '    return c'"


def _format_longer_run(request: TrainRequest, config: Config) -> str:
    """Return the arguments of a run twice as long, in the unit of the given length."""
    length = config.train.model_dump(include={"tokens", "steps", "epochs"})
    [(unit, count)] = [(unit, count) for unit, count in length.items() if count is not None]
    kept = [override for override in request.overrides if not override.startswith(f"train.{unit}=")]
    return shlex.join([str(request.config), *map(redact_text, kept), f"train.{unit}={2 * count}"])


def _find_relative_path(path: str) -> str:
    """Return a path from the current directory, or as it is if that has been deleted."""
    with suppress(FileNotFoundError):
        return os.path.relpath(path)
    return path
