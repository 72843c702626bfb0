"""Opening a run in a store: for the process that starts it, for those that take part, for those that only look."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.uri import is_address
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.runs.directory import RunDirectory, claim
from llm_training_toolkit.runs.storage.lease import CLAIMS, claimed
from llm_training_toolkit.runs.storage.s3_client import Bucket, StorageError
from llm_training_toolkit.runs.storage.s3_storage import Mirror
from llm_training_toolkit.runs.storage.storage import mirrors

_SEND_EVERY = 10.0
"""Seconds between two times that what has changed is sent: what a machine that is lost takes with it of its logs."""
Say = Callable[[str], None]
_LOCK = ".lock"


@contextmanager
def hold_stored(address: str, say: Say) -> Iterator[RunDirectory]:
    """The run at an address, held by this process. Raises LaunchError when another holds it, or the store refuses."""
    with ExitStack() as stack:
        with reached():
            stack.enter_context(claimed(Bucket(address), say))
        yield stack.enter_context(taking_part(address, say))


@contextmanager
def taking_part(address: str, say: Say) -> Iterator[RunDirectory]:
    """The run at an address, to be worked on: what is written here is sent every few seconds, and at the end.

    Raises LaunchError when the store refuses, at the beginning or at the end.
    """
    with looking(address) as run:
        mirror = mirrors[-1]
        ending = threading.Event()
        courier = threading.Thread(target=_carry, args=(mirror, ending, say), daemon=True, name="courier")
        courier.start()
        try:
            yield run
        except BaseException:
            with suppress(StorageError):  # it must not hide what it would tell of
                mirror.send(last=True)
            raise
        else:
            with reached():
                mirror.send(last=True)
        finally:
            ending.set()
            courier.join()


@contextmanager
def looking(address: str) -> Iterator[RunDirectory]:
    """The run at an address, to be read. Raises LaunchError when the store refuses."""
    with reached():
        bucket = Bucket(address)
    with staging_directory() as directory, _mirrored(bucket, directory) as mirror:
        yield mirror.run


@contextmanager
def _mirrored(bucket: Bucket, directory: Path) -> Iterator[Mirror]:
    """A run in a store, below a staging directory."""
    with reached():
        mirror = Mirror(bucket, directory / bucket.address.rpartition("/")[2])
        mirror.look(mirror.run.path)
        mirror.bring(mirror.run.metrics)
    mirrors.append(mirror)
    try:
        yield mirror
    finally:
        mirrors.remove(mirror)


@contextmanager
def opened(place: str, *, export: bool = False) -> Iterator[Path]:
    """A run or an exported directory at a path or an address, as a path; what is written there is sent at the end.

    `export`: with the files of what is exported. Raises LaunchError when a store refuses.
    """
    if not is_address(place):
        yield Path(place)
        return
    with reached():
        bucket, inner = Bucket(place), ""
        if bucket.get("resolved.json") is None:  # RUN/export, as it may be written of a run on a disk
            address, _, inner = place.rstrip("/").rpartition("/")
            bucket = Bucket(address)
    with staging_directory() as directory, _mirrored(bucket, directory) as mirror:
        path = mirror.run.path / inner
        with reached():
            if export and (inner or mirror.run.export.is_dir()):
                mirror.bring_directory(path if inner else mirror.run.export)
        yield path
        with reached():
            mirror.send(last=True)


@contextmanager
def runs_at(place: str) -> Iterator[Callable[[], Path]]:
    """The directory of runs at a path or an address: what is called to have it as it is now.

    Raises LaunchError when a store refuses.
    """
    if not is_address(place):
        yield lambda: Path(place)
        return
    with staging_directory() as directory, ExitStack() as stack:
        known: dict[str, Mirror] = {}

        def look() -> Path:
            with reached():
                for name in Bucket(place).directories():
                    if name not in known:
                        known[name] = stack.enter_context(_mirrored(Bucket(f"{place.rstrip('/')}/{name}"), directory))
                    else:
                        known[name].look(known[name].run.path)
                        known[name].bring(known[name].run.metrics)
            return directory

        yield look


def refusal_of(address: str) -> str:
    """Why this machine cannot work on the run at an address; empty where it can."""
    try:
        Bucket(address).listed(CLAIMS)
    except StorageError as error:
        return str(error)
    return ""


@contextmanager
def reached() -> Iterator[None]:
    """Turn what a store says into words for the person at the keyboard."""
    try:
        yield
    except StorageError as error:
        raise LaunchError(str(error)) from error


def _carry(mirror: Mirror, ending: threading.Event, say: Say) -> None:
    """Send what has changed every few seconds; the training does not wait, and a store that fails is tried again."""
    since = 0.0
    while not ending.wait(_SEND_EVERY):
        try:
            mirror.send()
        except OSError as error:
            if not since:
                since = time.monotonic()
                say(f"warning: metrics and logs wait here until the store takes them ({error})")
        else:
            if since:
                say(f"the store takes metrics and logs again, after {time.monotonic() - since:.0f} s")
            since = 0.0


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


def staging_root() -> Path:
    """Where this user's staging directories lie on this machine."""
    return Path(tempfile.gettempdir()) / f"llm-training-toolkit-{os.getuid()}"


@contextmanager
def staging_directory() -> Iterator[Path]:
    """An empty directory of this process, removed at the end."""
    root = staging_root()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_what_the_dead_left(root)
    path = Path(tempfile.mkdtemp(dir=root))
    try:
        with (path / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_what_the_dead_left(root: Path) -> None:
    for path in root.iterdir():
        with suppress(OSError), (path / _LOCK).open("r+") as lock:  # one without a lock is just being made
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
