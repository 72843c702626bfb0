"""Checkpoint saving for the training loop: schedule, manifest contents, retention.

The worker restores with `find_latest_valid_checkpoint` and `restore_engine` of restore.py before the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llm_training_toolkit.checkpoint import (
    AsyncWrite,
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
from llm_training_toolkit.distributed.events import CheckpointEvent, WarningEvent
from llm_training_toolkit.engine import Engine
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.attempts import find_takeover
from llm_training_toolkit.runs.directory import RunDirectory, parse_checkpoint_name
from llm_training_toolkit.runs.storage.s3_client import StorageError

_MAX_POLL_SECONDS = 0.5  # longest pause between two polls of all ranks for the end of their writes


@dataclass(frozen=True)
class CheckpointLineage:
    """Manifest fields that record the origin of a checkpoint: parent, attempt, configuration, data, versions."""

    attempt: int
    parent: str | None
    zero: int
    threads: int
    config_fingerprint: str
    data_fingerprint: str
    versions: Mapping[str, str]
    extra: Mapping[str, Any]
    run_id: str = ""


class _PendingCheckpoint(NamedTuple):
    """Checkpoint being written, with the training state it is of."""

    writing: AsyncWrite
    progress: TrainState


class CheckpointManager:
    """Checkpoints of a run: saved by steps or by time, then thinned out by the retention policy."""

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
        sync_metrics: Callable[[], None] | None = None,
    ) -> None:
        """Delete incomplete checkpoints of earlier attempts. `sync_metrics` is called before each commit."""
        self._sync_metrics = sync_metrics
        self._run, self._context, self._engine, self._lineage = run, context, engine, lineage
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._rule = rule
        self._losses: dict[int, float] = {}
        if context.is_rank_zero:
            delete_incomplete_checkpoints(run, attempt=lineage.attempt - 1)
            self._losses = held_out_losses(run.checkpoints_dir)
        with self._translate_memory_error(pieces := engine.owned_fragments()):
            self._memory = allocate_host_buffer(pieces, context.device if context.device.type == "cuda" else None)
        self._last = time.monotonic()
        self._begun: _PendingCheckpoint | None = None
        parent = parse_checkpoint_name(Path(lineage.parent)) if lineage.parent else None
        self._saved = parent[0] if parent else None

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` steps."""
        if self._every_steps is not None:
            return step % self._every_steps == 0
        assert self._every_seconds is not None
        return time.monotonic() - self._last >= self._every_seconds

    def record_eval_loss(self, step: int, loss: float) -> None:
        """Record the held-out loss after `step` steps, by which the best checkpoints are chosen."""
        self._losses[step] = loss

    @property
    def is_writing(self) -> bool:
        """True while this rank's part of a checkpoint is being written."""
        return self._begun is not None and not self._begun.writing.is_done

    @property
    def has_pending_checkpoint(self) -> bool:
        """True while a checkpoint has begun and is incomplete; the same on every rank."""
        return self._begun is not None

    def begin_save(self, progress: TrainState) -> float:
        """Copy the state, write it in the background, and return the seconds this call took. Collective.

        At most one checkpoint is pending: an earlier incomplete one is waited for. A step that is already saved is not
        copied again. Raises CheckpointError.
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
            writing = AsyncWrite(
                self._context.rank, directory, pieces, self._engine.optimizer, self._memory, storage=self._run.storage
            )
        self._begun = _PendingCheckpoint(writing, progress)
        self._last = time.monotonic()
        return self._last - started

    def finalize_save(self) -> None:
        """Wait for the pending checkpoint, if any, and commit it. Collective. Raises CheckpointError.

        The loop calls it once all ranks have written, which keeps the wait short, and at the end.
        """
        if self._begun is None:
            return
        self._context.heartbeat.set_phase(f"completing the checkpoint of step {self._begun.progress.step}")
        self._wait_for_writes(self._begun.writing)
        begun, self._begun = self._begun, None
        self._check_not_superseded()
        if self._sync_metrics is not None:
            self._sync_metrics()
        commit_checkpoint(self._context, begun.writing, self._describe_checkpoint(begun.progress))
        if self._context.is_rank_zero:
            self._apply_retention_policy()
            where = self._run.storage.get_uri(begun.writing.directory)
            self._context.report(CheckpointEvent(begun.progress.step, where))

    @contextmanager
    def _translate_memory_error(self, pieces: Sequence[ParameterShard]) -> Iterator[None]:
        """Turn MemoryError into CheckpointError, so that it is not mistaken for a micro-batch that is too large."""
        try:
            yield
        except MemoryError as error:
            needs = 12 * sum(piece.count for piece in pieces) / 1e9
            raise CheckpointError(
                f"rank {self._context.rank}: the copy of a checkpoint needs {needs:.1f} GB of the machine's memory, "
                "which it does not have: give the node more, or more nodes fewer workers each"
            ) from error

    def _wait_for_writes(self, writing: AsyncWrite) -> None:
        """Poll until every rank's part is written or has failed. Collective.

        Polls are short, since a long all-reduce counts as a hang; here only storage that accepts no more bytes does.
        """
        pause = 0.01
        while self._context.all_reduce_sum(not writing.is_done)[0]:
            self._context.heartbeat.keepalive(
                f"writing its part of a checkpoint, {writing.bytes_written:,} bytes so far"
            )
            time.sleep(pause)
            pause = min(2 * pause, _MAX_POLL_SECONDS)

    def _check_not_superseded(self) -> None:
        """Raise CheckpointError if a newer attempt or a new run owns the directory. Collective.

        Ranks that outlived their driver must not write beside those that replaced them.
        """
        takeover = self._context.broadcast_object(self._find_takeover() if self._context.is_rank_zero else None)
        if takeover:
            raise CheckpointError(
                f"{self._run.uri}: {takeover}; attempt {self._lineage.attempt} ends without saving, and the directory "
                "stays as it is"
            )

    def _find_takeover(self) -> str | None:
        with suppress(StorageError):  # the next write retries a store that does not answer now
            self._run.storage.refresh_directory(self._run.attempts_dir)
        return find_takeover(self._run, self._lineage.attempt, self._lineage.run_id)

    def _apply_retention_policy(self) -> None:
        """Apply the retention policy. A failure is only a warning, since the new checkpoint is written."""
        try:
            apply_retention_policy(self._run, self._rule, attempt=self._lineage.attempt, losses=self._losses)
        except OSError as error:
            message = f"old checkpoints of {self._run.uri} cannot be deleted ({error}); training continues"
            self._context.report(WarningEvent(message))

    def _describe_checkpoint(self, progress: TrainState) -> Manifest:
        """Return the manifest without files."""
        lineage = self._lineage
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
            column_parts=self._engine.column_parts,
            skips=progress.skips,
            recent=progress.recent,
            eval_loss=self._losses.get(progress.step),
            extra=lineage.extra,
            run_id=lineage.run_id,
        )
