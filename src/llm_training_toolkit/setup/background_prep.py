"""Prepares later epochs and partitions in a child process while earlier ones train, one after the other.

    driver ── starts ──> this module, with run and configuration ── rewrites ──> data/dataset_info.json
    ranks, at a step without its data ── wait for ──> data/dataset_info.json

The process reads a pipe: first the configuration, with the addresses that the run directory does not store whole, then
the SHA-256 of the dataset info that it adds to. The driver holds it open, and the process exits when it closes. If the
run directory has another dataset info, the run was removed or begun anew, and the process writes nothing more.
"""

from __future__ import annotations

import _thread
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llm_training_toolkit.config import Config, dump_config_json, parse_config_json
from llm_training_toolkit.data.prepare.builder import DatasetBuilder
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.data.prepare.epochs import (
    build_data_facts,
    get_tokenization_spec,
    read_preparation_state,
    write_preparation_state,
)
from llm_training_toolkit.data.prepare.shards import render_in_process
from llm_training_toolkit.distributed.events import WarningEvent
from llm_training_toolkit.errors import DataError, ToolkitError
from llm_training_toolkit.families import recall_plan
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.plan import DataFacts
from llm_training_toolkit.plan.horizon import find_shortest_stream, is_prepared
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.setup.resume import ResumeState, read_resume_state

_LEAVE_SECONDS = 10
_REPLACED = 3  # exit code: the run directory has a dataset info of another origin
_NICENESS = 10  # training workers get the CPU first


@contextmanager
def prepare_in_background(run: RunDirectory, config: Config, facts: DataFacts, console: Console) -> Iterator[None]:
    """Prepare the missing data in a child process while the run trains; start none if all is prepared."""
    if is_prepared(config, facts):
        write_preparation_state(run, "done")
        yield
        return
    write_preparation_state(run, "working")
    log = run.path / "logs" / "preparation.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # -P: a module of the current folder, such as bz2.py, is not imported in place of Python's own.
    command = [sys.executable, "-P", "-m", "llm_training_toolkit.setup.background_prep", str(run.path)]
    with log.open("a") as output:
        # Own session: Ctrl-C must reach the driver alone, which ends this process after saving.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has died: `_watch_process` says so
        process.stdin.write(json.dumps(json.loads(dump_config_json(config))).encode() + b"\n")
        process.stdin.write(_compute_info_digest(run).encode() + b"\n")
        process.stdin.flush()
    ending = threading.Event()
    watch = threading.Thread(
        target=_watch_process, args=(process, run, log, console, ending), daemon=True, name="preparation"
    )
    watch.start()
    try:
        yield
    finally:
        ending.set()
        _end_process(process)
        watch.join()


def _end_process(process: subprocess.Popen[bytes]) -> None:
    """Close the pipe, so that the process cleans up and exits. What is finished stays in the cache."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(_LEAVE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _watch_process(
    process: subprocess.Popen[bytes], run: RunDirectory, log: Path, console: Console, ending: threading.Event
) -> None:
    """Warn as soon as later data cannot be prepared, also if the process is killed for its memory."""
    if process.wait() == 0 or ending.is_set():
        return
    if run.lock is not None and run.lock.is_lost():
        return  # the run is another command's; its dataset info was not this process's
    state, why = read_preparation_state(run)
    if state == "working":
        why = f"the process that prepares it ended with {process.returncode}; see {log}"
        write_preparation_state(run, "failed", why)
    console.show_event(WarningEvent(f"later data cannot be prepared, the run ends before it: {why}"))


class _RunReplacedError(Exception):
    """Removal of the run while its later data were prepared; perhaps it was begun anew."""


def _prepare_remaining_parts(run: RunDirectory, config: Config, digest: str) -> None:
    """Add part after part until the run has all it needs. Raises DataError if that is impossible, _RunReplacedError.

    `digest` is that of the dataset info that the driver wrote.
    """
    _check_not_replaced(run, digest)
    config = recall_plan(config, run.path)
    resume_state = read_resume_state(run)
    dataset_info = resume_state.dataset_info
    assert dataset_info is not None, "it has a digest"
    work = DatasetBuilder(config, get_tokenization_spec(config), None, render_in_process)
    if work.fingerprint != dataset_info.fingerprint:
        raise DataError(
            "the documents have changed since the run began (paths, sizes or times of modification differ). Bring them "
            "back and start the run again: it resumes from its latest checkpoint."
        )
    while not is_prepared(config, build_data_facts(dataset_info, resume_state.step, resume_state.sequences)):
        dataset_info = work.build_parts(_plan_next_part(config, dataset_info, resume_state)).dataset_info
        _check_not_replaced(run, digest)
        write_atomically(run.dataset_info_path, dataset_info.to_json())
        digest = _compute_info_digest(run)


def _check_not_replaced(run: RunDirectory, digest: str) -> None:
    """Raise _RunReplacedError unless the run still has the dataset info that this process or its driver wrote."""
    try:
        found = _compute_info_digest(run)
    except FileNotFoundError as error:
        raise _RunReplacedError from error
    if found != digest:
        raise _RunReplacedError


def _compute_info_digest(run: RunDirectory) -> str:
    return hashlib.sha256(run.dataset_info_path.read_bytes()).hexdigest()


def _plan_next_part(config: Config, dataset_info: DatasetInfo, resume_state: ResumeState) -> list[int]:
    """Return the parts of each stream, with one more for the stream that runs out first."""
    facts = build_data_facts(dataset_info, resume_state.step, resume_state.sequences)
    first = find_shortest_stream(config, facts)
    return [len(stream.epochs) + (number == first) for number, stream in enumerate(dataset_info.streams)]


def _exit_with_driver() -> None:
    os.read(sys.stdin.fileno(), 1)  # a read from sys.stdin would hold its lock at exit
    _thread.interrupt_main()  # the exception removes half-built output


def main() -> None:
    """Prepare the missing data of the run in argv; record a failure for its ranks."""
    run = RunDirectory(Path(sys.argv[1]))
    with open(0, "rb", buffering=0, closefd=False) as driver:
        config = parse_config_json(driver.readline().decode(), where="the driver's configuration")
        digest = driver.readline().decode().strip()
    threading.Thread(target=_exit_with_driver, daemon=True, name="driver").start()
    os.nice(_NICENESS)
    try:
        _prepare_remaining_parts(run, config, digest)
    except KeyboardInterrupt:
        return
    except _RunReplacedError:
        sys.exit(_REPLACED)
    except (ToolkitError, OSError, MemoryError) as error:
        write_preparation_state(run, "failed", str(error) or type(error).__name__)
        raise
    write_preparation_state(run, "done")


if __name__ == "__main__":
    main()
