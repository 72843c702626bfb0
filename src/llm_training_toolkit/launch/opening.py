"""The directory of a run, wherever it lies: held by the process that starts it, joined by its ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.address import is_address
from llm_training_toolkit.runs import RunDirectory, claim
from llm_training_toolkit.storage.opening import hold_stored, taking_part


def place_of(config: Config) -> str:
    """The path or address of a run's directory."""
    if is_address(config.run.dir):
        return f"{config.run.dir.rstrip('/')}/{config.run.name}"
    return str(Path(config.run.dir).expanduser().absolute() / config.run.name)


@contextmanager
def held(place: str, say: Callable[[str], None]) -> Iterator[RunDirectory]:
    """The run at a place, held by this process. Raises LaunchError when another holds it, or nothing can be written."""
    if is_address(place):
        with hold_stored(place, say) as run:
            yield run
    else:
        run = RunDirectory(Path(place))
        with claim(run):
            yield run


@contextmanager
def joined(place: str, say: Callable[[str], None]) -> Iterator[RunDirectory]:
    """The run at a place, which another process holds and this one takes part in."""
    if is_address(place):
        with taking_part(place, say) as run:
            yield run
    else:
        yield RunDirectory(Path(place))
