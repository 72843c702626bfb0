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
    AsyncWrite,
    FileEntry,
    Manifest,
    ParameterShard,
    RetentionPolicy,
    allocate_host_buffer,
    apply_retention_policy,
    commit_checkpoint,
    delete_incomplete_checkpoints,
    held_out_losses,
)
from llm_training_toolkit.checkpoint.state import TrainState
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.engine import Engine
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.attempts import find_last_attempt
from llm_training_toolkit.runs.directory import RunDirectory, parse_checkpoint_name
from llm_training_toolkit.runs.storage import StorageError, find_storage

_MAX_POLL_SECONDS = 0.5
"""Seconds between two questions whether all ranks have written, where that takes long."""


@dataclass(frozen=True)
class CheckpointLineage:
    """What a manifest says beyond the weights: where they come from and what made them."""

    attempt: int
    parent: str | None
    zero: int
    threads: int
    config_fingerprint: str
    data_fingerprint: str
    versions: Mapping[str, str]
    extra: Mapping[str, Any]


class _PendingCheckpoint(NamedTuple):
    """A checkpoint on its way, and the moment it is of."""

    writing: AsyncWrite
    progress: TrainState


class CheckpointManager:
    """Writes a checkpoint when steps or time say so, then deletes what need not be kept."""

    def __init__(
        self,
        run: RunDirectory,
        context: RunContext,
        engine: Engine,
        lineage: CheckpointLineage,
        *,
        every_steps: int | None,
        every_seconds: float | None,
        rule: RetentionPolicy,
    ) -> None:
        self._run, self._context, self._engine, self._lineage = run, context, engine, lineage
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._rule = rule
        self._where = find_storage(run.path).get_uri(run.path)
        self._losses: dict[int, float] = {}
        if context.is_rank_zero:
            delete_incomplete_checkpoints(run.checkpoints_dir, attempt=lineage.attempt - 1)
            self._losses = held_out_losses(run.checkpoints_dir)
        with self._translate_memory_error(pieces := engine.owned_fragments()):
            self._memory = allocate_host_buffer(pieces)
        self._last = time.monotonic()
        self._begun: _PendingCheckpoint | None = None
        parent = parse_checkpoint_name(Path(lineage.parent)) if lineage.parent else None
        self._saved = parent[0] if parent else None

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        if self._every_steps is not None:
            return step % self._every_steps == 0
        assert self._every_seconds is not None
        return time.monotonic() - self._last >= self._every_seconds

    def record_eval_loss(self, step: int, loss: float) -> None:
        """The held-out loss after `step` steps, by which the best checkpoints are told."""
        self._losses[step] = loss

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part of a checkpoint is still being written."""
        return self._begun is not None and not self._begun.writing.is_done

    @property
    def has_pending_checkpoint(self) -> bool:
        """Whether a checkpoint has begun that is not complete yet; the same on every rank."""
        return self._begun is not None

    def begin_save(self, progress: TrainState) -> float:
        """Copy this moment, to be written behind the training; the seconds it took. Collective.

        There is never more than one on its way: a checkpoint before that is not complete yet is waited for. Where this
        step is that of the newest one, it is there. Raises CheckpointError.
        """
        started = time.monotonic()
        if progress.step == self._saved:
            return 0.0
        self.finalize_save()
        self._saved = progress.step
        self._check_not_superseded()
        directory = self._run.get_checkpoint_dir(progress.step, self._lineage.attempt)
        pieces = self._engine.owned_fragments()
        with self._translate_memory_error(pieces):
            writing = AsyncWrite(self._context.rank, directory, pieces, self._engine.optimizer, self._memory)
        self._begun = _PendingCheckpoint(writing, progress)
        self._last = time.monotonic()
        return self._last - started

    def finalize_save(self) -> None:
        """Wait for the checkpoint that has begun, if there is one, and complete it. Collective. Raises CheckpointError.

        The loop calls it once all ranks have written, so that nobody waits long, and at the end.
        """
        if self._begun is None:
            return
        self._context.heartbeat.set_phase(f"completing the checkpoint of step {self._begun.progress.step}")
        self._wait_for_writes(self._begun.writing)
        begun, self._begun = self._begun, None
        self._check_not_superseded()
        commit_checkpoint(self._context, begun.writing, self._make_manifest_builder(begun.progress))
        if self._context.is_rank_zero:
            self._apply_retention_policy()
            where = find_storage(begun.writing.directory).get_uri(begun.writing.directory)
            self._context.report({"kind": "checkpoint", "step": begun.progress.step, "path": where})

    @contextmanager
    def _translate_memory_error(self, pieces: Sequence[ParameterShard]) -> Iterator[None]:
        """Too little memory for the copy, in words: it must not be taken for a micro-batch that is too large."""
        try:
            yield
        except MemoryError as error:
            needs = 12 * sum(piece.count for piece in pieces) / 1e9
            raise CheckpointError(
                f"rank {self._context.rank}: the copy of a checkpoint needs {needs:.1f} GB of the machine's memory, "
                "which it does not have: give the node more, or more nodes fewer workers each"
            ) from error

    def _wait_for_writes(self, writing: AsyncWrite) -> None:
        """Until every rank's part is written, or has failed. Collective.

        Short exchanges, since a long one counts as a hang: here only storage that takes nothing any more does.
        """
        pause = 0.01
        while self._context.all_reduce_sum(not writing.is_done)[0]:
            self._context.heartbeat.keepalive(
                f"writing its part of a checkpoint, {writing.bytes_written:,} bytes so far"
            )
            time.sleep(pause)
            pause = min(2 * pause, _MAX_POLL_SECONDS)

    def _check_not_superseded(self) -> None:
        """Ranks that outlived their driver must not write beside those of the start that replaced them. Collective."""
        newest_attempt = self._context.broadcast_object(self._read_last_attempt() if self._context.is_rank_zero else 0)
        if newest_attempt > self._lineage.attempt:
            raise CheckpointError(
                f"{self._where}: attempt {newest_attempt} has taken over this run; attempt {self._lineage.attempt} "
                "ends without saving. Nothing is lost: the run goes on there"
            )

    def _read_last_attempt(self) -> int:
        with suppress(StorageError):  # a store that does not answer now is tried again by whoever writes there
            find_storage(self._run.path).refresh_directory(self._run.attempts_dir)
        return find_last_attempt(self._run)

    def _apply_retention_policy(self) -> None:
        """Deleting what need not be kept must not end a run whose checkpoint is written."""
        try:
            apply_retention_policy(
                self._run.checkpoints_dir, self._rule, attempt=self._lineage.attempt, losses=self._losses
            )
        except OSError as error:
            message = f"old checkpoints of {self._where} cannot be deleted ({error}); training goes on"
            self._context.report({"kind": "warning", "message": message})

    def _make_manifest_builder(self, progress: TrainState) -> Any:  # noqa: ANN401 - checkpoint.Describe
        lineage = self._lineage

        def build_manifest(files: tuple[FileEntry, ...], fragments: tuple[tuple[str, int, int, int], ...]) -> Manifest:
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

        return build_manifest
