"""When a run saves, what it writes into the manifest, and how an engine is brought back to a checkpoint.

Called by the worker: `CheckpointSaver` for the loop, `newest_sound` and `restore` before it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llm_training_toolkit.checkpoint import (
    FileEntry,
    Manifest,
    Piece,
    Rule,
    Writing,
    clean,
    clear_unfinished,
    finish,
    held_out_losses,
    memory_for,
)
from llm_training_toolkit.checkpoint.state import Progress
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.engine import Engine
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.attempts import last_attempt
from llm_training_toolkit.runs.directory import RunDirectory, checkpoint_place
from llm_training_toolkit.runs.storage import StorageError, storage_of

_ASK_EVERY = 0.5
"""Seconds between two questions whether all ranks have written, where that takes long."""


@dataclass(frozen=True)
class Lineage:
    """What a manifest says beyond the weights: where they come from and what made them."""

    attempt: int
    parent: str | None
    zero: int
    threads: int
    config_fingerprint: str
    data_fingerprint: str
    versions: Mapping[str, str]
    extra: Mapping[str, Any]


class _Begun(NamedTuple):
    """A checkpoint on its way, and the moment it is of."""

    writing: Writing
    progress: Progress


class CheckpointSaver:
    """Writes a checkpoint when steps or time say so, then deletes what need not be kept."""

    def __init__(
        self,
        run: RunDirectory,
        context: RunContext,
        engine: Engine,
        lineage: Lineage,
        *,
        every_steps: int | None,
        every_seconds: float | None,
        rule: Rule,
    ) -> None:
        self._run, self._context, self._engine, self._lineage = run, context, engine, lineage
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._rule = rule
        self._where = storage_of(run.path).address(run.path)
        self._losses: dict[int, float] = {}
        if context.is_first:
            clear_unfinished(run.checkpoints, attempt=lineage.attempt - 1)
            self._losses = held_out_losses(run.checkpoints)
        with self._room_for(pieces := engine.owned_fragments()):
            self._memory = memory_for(pieces)
        self._last = time.monotonic()
        self._begun: _Begun | None = None
        parent = checkpoint_place(Path(lineage.parent)) if lineage.parent else None
        self._saved = parent[0] if parent else None

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        if self._every_steps is not None:
            return step % self._every_steps == 0
        assert self._every_seconds is not None
        return time.monotonic() - self._last >= self._every_seconds

    def measured(self, step: int, loss: float) -> None:
        """The held-out loss after `step` steps, by which the best checkpoints are told."""
        self._losses[step] = loss

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part of a checkpoint is still being written."""
        return self._begun is not None and not self._begun.writing.is_done

    @property
    def has_begun(self) -> bool:
        """Whether a checkpoint has begun that is not complete yet; the same on every rank."""
        return self._begun is not None

    def begin(self, progress: Progress) -> float:
        """Copy this moment, to be written behind the training; the seconds it took. Collective.

        There is never more than one on its way: a checkpoint before that is not complete yet is waited for. Where this
        step is that of the newest one, it is there. Raises CheckpointError.
        """
        started = time.monotonic()
        if progress.step == self._saved:
            return 0.0
        self.complete()
        self._saved = progress.step
        self._refuse_after_a_newer_attempt()
        directory = self._run.checkpoint(progress.step, self._lineage.attempt)
        pieces = self._engine.owned_fragments()
        with self._room_for(pieces):
            writing = Writing(self._context.rank, directory, pieces, self._engine.optimizer, self._memory)
        self._begun = _Begun(writing, progress)
        self._last = time.monotonic()
        return self._last - started

    def complete(self) -> None:
        """Wait for the checkpoint that has begun, if there is one, and complete it. Collective. Raises CheckpointError.

        The loop calls it once all ranks have written, so that nobody waits long, and at the end.
        """
        if self._begun is None:
            return
        self._context.pulse.mark(f"completing the checkpoint of step {self._begun.progress.step}")
        self._wait(self._begun.writing)
        begun, self._begun = self._begun, None
        self._refuse_after_a_newer_attempt()
        finish(self._context, begun.writing, self._describe(begun.progress))
        if self._context.is_first:
            self._clean()
            where = storage_of(begun.writing.directory).address(begun.writing.directory)
            self._context.report({"kind": "checkpoint", "step": begun.progress.step, "path": where})

    @contextmanager
    def _room_for(self, pieces: Sequence[Piece]) -> Iterator[None]:
        """Too little memory for the copy, in words: it must not be taken for a micro-batch that is too large."""
        try:
            yield
        except MemoryError as error:
            needs = 12 * sum(piece.count for piece in pieces) / 1e9
            raise CheckpointError(
                f"rank {self._context.rank}: the copy of a checkpoint needs {needs:.1f} GB of the machine's memory, "
                "which it does not have: give the node more, or more nodes fewer workers each"
            ) from error

    def _wait(self, writing: Writing) -> None:
        """Until every rank's part is written, or has failed. Collective.

        Short exchanges, since a long one counts as a hang: here only storage that takes nothing any more does.
        """
        pause = 0.01
        while self._context.sum(not writing.is_done)[0]:
            self._context.pulse.advance(f"writing its part of a checkpoint, {writing.size:,} bytes so far")
            time.sleep(pause)
            pause = min(2 * pause, _ASK_EVERY)

    def _refuse_after_a_newer_attempt(self) -> None:
        """Ranks that outlived their driver must not write beside those of the start that replaced them. Collective."""
        newest_attempt = self._context.broadcast(self._last_attempt() if self._context.is_first else 0)
        if newest_attempt > self._lineage.attempt:
            raise CheckpointError(
                f"{self._where}: attempt {newest_attempt} has taken over this run; attempt {self._lineage.attempt} "
                "ends without saving. Nothing is lost: the run goes on there"
            )

    def _last_attempt(self) -> int:
        with suppress(StorageError):  # a store that does not answer now is tried again by whoever writes there
            storage_of(self._run.path).look(self._run.attempts)
        return last_attempt(self._run)

    def _clean(self) -> None:
        """Deleting what need not be kept must not end a run whose checkpoint is written."""
        try:
            clean(self._run.checkpoints, self._rule, attempt=self._lineage.attempt, losses=self._losses)
        except OSError as error:
            message = f"old checkpoints of {self._where} cannot be deleted ({error}); training goes on"
            self._context.report({"kind": "warning", "message": message})

    def _describe(self, progress: Progress) -> Any:  # noqa: ANN401 - checkpoint.Describe
        lineage = self._lineage

        def describe(files: tuple[FileEntry, ...], fragments: tuple[tuple[str, int, int, int], ...]) -> Manifest:
            return Manifest(
                step=progress.step,
                tokens=progress.tokens,
                sequences=progress.sequences,
                attempt=lineage.attempt,
                parent=lineage.parent,
                world_size=self._context.world_size,
                zero=lineage.zero,
                threads=lineage.threads,
                config_fingerprint=lineage.config_fingerprint,
                data_fingerprint=lineage.data_fingerprint,
                versions=lineage.versions,
                shapes=self._engine.shapes,
                files=files,
                fragments=fragments,
                skips=progress.skips,
                recent=progress.recent,
                eval_loss=self._losses.get(progress.step),
                extra=lineage.extra,
            )

        return describe
