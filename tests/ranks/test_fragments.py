"""DeepSpeed's internal attributes that fragments are read through: an upgrade that moves one fails here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

import rank_tasks
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("zero", "offload"),
    [(0, "none"), (1, "none"), (1, "optimizer"), (2, "none"), (3, "none"), (3, "optimizer_and_weights")],
)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_pieces_that_ranks_own_are_every_weight_once(
    pools: Callable[[int], RankPool], prepared_run: RunDirectory, workers: int, zero: int, offload: str, precision: str
) -> None:
    changes = {"engine": {"zero_stage": zero, "offload": offload}, "train": {"precision": precision}}
    answers = pools(workers).run(rank_tasks.list_fragments, run=str(prepared_run.path), changes=changes)
    sizes: dict[str, int] = answers[0][0]
    owned: list[tuple[str, int, int]] = [piece for _, pieces in answers for piece in pieces]
    held = Counter[str]()
    reached: dict[str, int] = {}
    for name, start, count in sorted(owned):
        assert start == reached.get(name, 0), name
        reached[name] = start + count
        held[name] += count
    assert held == sizes
    if zero:
        shares = [sum(count for _, _, count in pieces) for _, pieces in answers]
        assert max(shares) <= 1.3 * sum(sizes.values()) / workers
