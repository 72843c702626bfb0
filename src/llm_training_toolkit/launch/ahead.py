"""Prepares later epochs while the earlier ones train: in a process of its own, one epoch after the other.

    driver ── starts ──> this module, with the run directory ── rewrites ──> data/receipt.json
    ranks, at a step whose epoch is not there yet ── wait for ──> data/receipt.json

The process ends with its driver: it reads a pipe that the driver holds open.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_training_toolkit.config import Config
from llm_training_toolkit.data.prepare import prepare
from llm_training_toolkit.data.receipt import Receipt
from llm_training_toolkit.errors import DataError, ToolkitError
from llm_training_toolkit.launch.preparation import covers, facts_of, markers_of
from llm_training_toolkit.launch.standing import Standing, standing_of
from llm_training_toolkit.plan import DataFacts, make_plan
from llm_training_toolkit.runs import RunDirectory, write_atomically

_LOOK_SECONDS = 0.5
_NICENESS = 10
"""Workers that have their data come first."""


@contextmanager
def preparing_ahead(run: RunDirectory, config: Config, facts: DataFacts) -> Iterator[None]:
    """Have the epochs that the run still lacks prepared while it trains; nothing where it has them all."""
    run.preparation_error.unlink(missing_ok=True)
    if covers(config, facts):
        yield
        return
    log = run.path / "logs" / "preparation.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "llm_training_toolkit.launch.ahead", str(run.path)]
    with log.open("a") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT)
    watch = threading.Thread(target=_watch, args=(process, run, log), daemon=True, name="preparation")
    watch.start()
    try:
        yield
    finally:
        process.kill()  # what it has finished lies in the cache, whole
        watch.join()


def _watch(process: subprocess.Popen[bytes], run: RunDirectory, log: Path) -> None:
    """A process that ends without a word, killed for its memory for example, must not leave the ranks waiting."""
    if process.wait() and not run.preparation_error.exists():
        text = f"the process that prepares later epochs ended with {process.returncode}; see {log}"
        write_atomically(run.preparation_error, text)


def newer_receipt(run: RunDirectory, known: Receipt) -> Receipt:
    """Wait for a receipt with more epochs than the known one. Raises DataError when there will be none."""
    while True:
        if run.preparation_error.exists():
            raise DataError(run.preparation_error.read_text(encoding="utf-8"))
        receipt = Receipt.from_json(run.receipt.read_text(encoding="utf-8"))
        if receipt != known:
            return receipt
        time.sleep(_LOOK_SECONDS)


def prepare_rest(run: RunDirectory) -> None:
    """Prepare epoch after epoch until the run has all it needs. Raises DataError where that cannot be."""
    standing = standing_of(run)
    config, receipt = standing.config, standing.receipt
    if config is None or receipt is None:
        raise DataError(f"{run.path}: is no run that has begun")
    while not covers(config, facts_of(receipt, standing.step, standing.sequences)):
        prepared = prepare(config, markers_of(config), epochs=_one_more(config, receipt, standing))
        if prepared.receipt.fingerprint != receipt.fingerprint:
            raise DataError(
                "the documents have changed while the run trained (paths, sizes or times of modification differ), so "
                "later epochs cannot be prepared. Bring them back and start the run again: it goes on from its newest "
                "checkpoint."
            )
        receipt = prepared.receipt
        write_atomically(run.receipt, receipt.to_json())


def _one_more(config: Config, receipt: Receipt, standing: Standing) -> list[int]:
    """The epochs there are and one more, of the stream that runs out first."""
    facts = facts_of(receipt, standing.step, standing.sequences)
    plan = make_plan(config, facts)
    assert plan.steps is not None  # runs over epochs are prepared whole
    needed = facts.needed(plan.steps, plan.global_batch)
    reach = [
        sum(stream.sequences_per_epoch) / count if count else 1.0
        for stream, count in zip(facts.streams, needed, strict=True)
    ]
    first = reach.index(min(reach))
    return [len(stream.epochs) + (number == first) for number, stream in enumerate(receipt.streams)]


def _end_with_the_driver() -> None:
    os.read(sys.stdin.fileno(), 1)  # not sys.stdin: its lock would be held while this process ends
    os._exit(0)


def main() -> None:
    """Prepare what the run named on the command line lacks; why it failed is written where its ranks look."""
    run = RunDirectory(Path(sys.argv[1]))
    threading.Thread(target=_end_with_the_driver, daemon=True, name="driver").start()
    os.nice(_NICENESS)
    try:
        prepare_rest(run)
    except (ToolkitError, OSError, MemoryError) as error:
        write_atomically(run.preparation_error, str(error) or type(error).__name__)
        raise


if __name__ == "__main__":
    main()
