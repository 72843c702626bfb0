"""Division of a step's sequences among replicas. The global batch never changes."""

from __future__ import annotations

from typing import Literal

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.errors import PlanError

# Logits per chunk of the loss: 0.4 GB in bf16. For Qwen's vocabulary 441 rows, still enough for a matrix product.
_LOGITS = 2**26


def get_micro_batch(config: Config) -> int:
    """Return the sequences per forward pass on one worker; 1 while `auto` is not resolved."""
    rows = config.train.micro_batch_size
    return 1 if rows == "auto" else rows


def compute_loss_chunk_size(setting: int | Literal["auto"], vocabulary: int) -> int:
    """Return `model.loss_chunk_size` in tokens; `auto` = equal memory for every vocabulary. 0 = no chunks."""
    return max(1, _LOGITS // vocabulary) if setting == "auto" else setting


def count_replicas(ranks: int, ranks_per_replica: int) -> int:
    """Return the number of replicas of `ranks_per_replica` ranks each, at least 1."""
    return max(ranks // ranks_per_replica, 1)


def split_global_batch(global_batch: int, replicas: int) -> tuple[int, ...]:
    """Return the sequences of each replica: they differ by at most one, larger first, and sum to the global batch.

    Raises PlanError if a replica would have no sequence.
    """
    if not 1 <= replicas <= global_batch:
        raise PlanError(
            f"train.global_batch_size = {global_batch} cannot be divided among {replicas} replicas: each needs a "
            "sequence. "
            f"Use 1 to {global_batch} workers, or a larger global batch."
        )
    share, rest = divmod(global_batch, replicas)
    return tuple(share + (rank < rest) for rank in range(replicas))


def compute_replica_slice(sequences: int, replicas: int, rank: int) -> range:
    """Return the positions of replica `rank` in a step's sequences, in order. Raises IndexError for an invalid rank.

    The short last step of a run over epochs may leave some replicas without sequences.
    """
    if not 0 <= rank < replicas:
        raise IndexError(f"rank {rank} of {replicas} replicas")
    share, rest = divmod(sequences, replicas)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def compute_accumulation_steps(global_batch: int, replicas: int, micro_batch: int) -> int:
    """Return the micro-batches per step: equal on all replicas, some empty where a share is smaller."""
    return -(-split_global_batch(global_batch, replicas)[0] // micro_batch)
