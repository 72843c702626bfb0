"""Opening of runs in a store: to start them, to take part as a worker, or to read."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.runs.directory import RunDirectory, lock_run_directory
from llm_training_toolkit.runs.storage.lease import CLAIMS, hold_lease
from llm_training_toolkit.runs.storage.object_keys import find_name_problem
from llm_training_toolkit.runs.storage.s3_client import S3Client, StorageError, UnsafeKeyError
from llm_training_toolkit.runs.storage.s3_storage import RunReplacedError, S3Storage
from llm_training_toolkit.runs.storage.storage import Storage
from llm_training_toolkit.runs.user_directory import create_user_directory

_SEND_EVERY = 10.0  # seconds between two flushes: a lost machine loses this much of its logs
Say = Callable[[str], None]
_LOCK = ".lock"


@contextmanager
def lock_stored_run(address: str, say: Say) -> Iterator[RunDirectory]:
    """Lock and open the run at an address. Raises LaunchError if another process holds it or the store refuses."""
    with ExitStack() as stack:
        with storage_errors():
            lease = stack.enter_context(hold_lease(S3Client(address), say))
        yield replace(stack.enter_context(open_worker(address, say)), lock=lease)


@contextmanager
def open_worker(address: str, say: Say) -> Iterator[RunDirectory]:
    """Open the run at an address for writing; changes are flushed every few seconds and at the end.

    Raises LaunchError if the store refuses, at the beginning or at the end.
    """
    with open_readonly(address) as run:
        ending = threading.Event()
        courier = threading.Thread(
            target=_flush_periodically, args=(run.storage, ending, say), daemon=True, name="courier"
        )
        courier.start()
        try:
            yield run
        except BaseException:
            with suppress(StorageError):  # must not hide the original error
                run.storage.flush(last=True)
            raise
        else:
            with storage_errors():
                run.storage.flush(last=True)
        finally:
            ending.set()
            courier.join()


@contextmanager
def open_readonly(address: str) -> Iterator[RunDirectory]:
    """Open the run at an address for reading. Raises LaunchError if the store refuses."""
    with storage_errors():
        bucket = S3Client(address)
    with create_staging_directory() as directory:
        with storage_errors():
            mirror = _open_s3_storage(bucket, directory)
        yield mirror.run


def _open_s3_storage(bucket: S3Client, directory: Path) -> S3Storage:
    """Open a run in a store, with its files below a staging directory. Raises StorageError."""
    mirror = S3Storage(bucket, directory / bucket.address.rpartition("/")[2])
    mirror.refresh_directory(mirror.run.path)
    mirror.fetch_file(mirror.run.metrics_path)
    return mirror


@contextmanager
def open_path(place: str, *, export: bool = False) -> Iterator[RunDirectory]:
    """Open a run or exported directory at a path or address; changes are flushed at the end.

    With `export`, exported files are fetched. Raises LaunchError if a store refuses.
    """
    if not is_uri(place):
        yield RunDirectory(Path(place))
        return
    with storage_errors():
        bucket, inner = S3Client(place), ""
        if bucket.get_object("resolved.json") is None:  # RUN/export, as allowed for runs on a disk
            address, _, inner = place.rstrip("/").rpartition("/")
            bucket = S3Client(address)
    with create_staging_directory() as directory:
        with storage_errors():
            mirror = _open_s3_storage(bucket, directory)
        path = mirror.run.path / inner
        with storage_errors():
            if export and (inner or mirror.run.export_dir.is_dir()):
                mirror.fetch_directory(path if inner else mirror.run.export_dir)
        yield RunDirectory(path, mirror)
        with storage_errors():
            mirror.flush(last=True)


@contextmanager
def open_runs_directory(place: str, say: Say) -> Iterator[Callable[[], list[RunDirectory]]]:
    """Open the directory of runs at a path or address; yield a function that returns them as they are now.

    A run has a `resolved.json` or a `lock`.

    `say` is told of each run that is left out for its object keys. Raises LaunchError if a store refuses.
    """
    if not is_uri(place):
        yield lambda: _list_local_runs(Path(place))
        return
    with create_staging_directory() as directory:
        known: dict[str, S3Storage] = {}
        refused: set[str] = set()

        def refresh_run(name: str) -> None:
            if name in known:
                known[name].refresh_directory(known[name].run.path)
                known[name].fetch_file(known[name].run.metrics_path)
                return
            if problem := find_name_problem(name):
                raise UnsafeKeyError(f"{place}: it holds a run with a name that no run has, {name!r} ({problem})")
            bucket = S3Client(f"{place.rstrip('/')}/{name}")
            known[name] = _open_s3_storage(bucket, directory)

        def refresh_runs() -> list[RunDirectory]:
            with storage_errors():
                for name in S3Client(place).list_directories():
                    try:
                        refresh_run(name)
                    except UnsafeKeyError as error:
                        if name not in refused:
                            refused.add(name)
                            say(f"left out: {error}")
            return [storage.run for storage in known.values() if _looks_like_run(storage.run.path)]

        yield refresh_runs


def _list_local_runs(directory: Path) -> list[RunDirectory]:
    found = directory.iterdir() if directory.is_dir() else []
    return [RunDirectory(path) for path in found if _looks_like_run(path)]


def _looks_like_run(path: Path) -> bool:
    return path.is_dir() and ((path / "resolved.json").is_file() or (path / "lock").is_file())


def find_store_problem(address: str) -> str | None:
    """Return the reason why this machine cannot use the run at an address; None if it can."""
    try:
        S3Client(address).list_objects(CLAIMS)
    except StorageError as error:
        return str(error)
    return None


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn StorageError into LaunchError."""
    try:
        yield
    except StorageError as error:
        raise LaunchError(str(error)) from error


def _flush_periodically(mirror: Storage, ending: threading.Event, say: Say) -> None:
    """Flush every few seconds without blocking training; retry if the store fails."""
    since = 0.0
    while not ending.wait(_SEND_EVERY):
        try:
            mirror.flush()
        except RunReplacedError as error:
            say(f"warning: {error}")
            return
        except Exception as error:  # noqa: BLE001 - the edge of a thread: boto3 cannot start one of its own, for instance
            if not since:
                since = time.monotonic()
                say(f"warning: metrics and logs wait here until the store takes them ({error})")
        else:
            if since:
                say(f"the store takes metrics and logs again, after {time.monotonic() - since:.0f} s")
            since = 0.0


def get_run_location(config: Config) -> str:
    """Return the path or address of a run's directory."""
    if is_uri(config.run.dir):
        return f"{config.run.dir.rstrip('/')}/{config.run.name}"
    return str(Path(config.run.dir).expanduser().absolute() / config.run.name)


@contextmanager
def lock_run(place: str, say: Callable[[str], None]) -> Iterator[RunDirectory]:
    """Lock the run at a path or address. Raises LaunchError if another process holds it or it is not writable."""
    if is_uri(place):
        with lock_stored_run(place, say) as run:
            yield run
    else:
        with lock_run_directory(RunDirectory(Path(place))) as run:
            yield run


@contextmanager
def join_run(place: str, say: Callable[[str], None]) -> Iterator[RunDirectory]:
    """Open the run at a path or address that another process has locked, to take part in it."""
    if is_uri(place):
        with open_worker(place, say) as run:
            yield run
    else:
        yield RunDirectory(Path(place))


def create_staging_root() -> Path:
    """Return the parent of this user's staging directories on this machine. Raises LaunchError if it is another's."""
    return create_user_directory("llm-training-toolkit")


@contextmanager
def create_staging_directory() -> Iterator[Path]:
    """Create an empty directory for this process and remove it at the end."""
    root = create_staging_root()
    _remove_stale_directories(root)
    path = Path(tempfile.mkdtemp(dir=root))
    try:
        with (path / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_stale_directories(root: Path) -> None:
    for path in root.iterdir():
        with suppress(OSError), (path / _LOCK).open("r+") as lock:  # without a lock it is being created
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
