"""Dividing a global batch: nothing lost, nothing doubled, nobody idle."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.plan import (
    compute_accumulation_steps,
    compute_loss_chunk_size,
    compute_replica_slice,
    split_global_batch,
)


@st.composite
def divided(draw: st.DrawFn) -> tuple[int, int]:
    batch = draw(st.integers(1, 4096))
    return batch, draw(st.integers(1, min(batch, 512)))


@given(divided())
def test_shares_sum_to_the_batch_and_differ_by_at_most_one(case: tuple[int, int]) -> None:
    portions = split_global_batch(*case)
    assert sum(portions) == case[0]
    assert len(portions) == case[1]
    assert portions[0] - portions[-1] <= 1
    assert list(portions) == sorted(portions, reverse=True)
    assert portions[-1] >= 1


@given(divided())
def test_slices_are_the_batch_in_order(case: tuple[int, int]) -> None:
    batch, replicas = case
    joined = [position for rank in range(replicas) for position in compute_replica_slice(batch, replicas, rank)]
    assert joined == list(range(batch))


@given(divided(), st.integers(1, 64))
def test_accumulation_holds_every_share_and_no_more(case: tuple[int, int], micro_batch: int) -> None:
    steps = compute_accumulation_steps(*case, micro_batch)
    largest = max(split_global_batch(*case))
    assert (steps - 1) * micro_batch < largest <= steps * micro_batch


@pytest.mark.parametrize(("batch", "replicas"), [(4, 5), (4, 0), (4, -1)])
def test_a_worker_without_work_is_refused(batch: int, replicas: int) -> None:
    with pytest.raises(PlanError, match="cannot be divided"):
        split_global_batch(batch, replicas)


@pytest.mark.parametrize("rank", [-1, 3])
def test_a_rank_that_does_not_exist(rank: int) -> None:
    with pytest.raises(IndexError):
        compute_replica_slice(8, 3, rank)


@pytest.mark.parametrize(("vocabulary", "tokens"), [(151_936, 441), (49_152, 1365), (4096, 16_384), (2**27, 1)])
def test_chunks_of_the_loss_have_as_many_logits_for_every_vocabulary(vocabulary: int, tokens: int) -> None:
    assert compute_loss_chunk_size("auto", vocabulary) == tokens
    assert compute_loss_chunk_size(0, vocabulary) == 0
    assert compute_loss_chunk_size(64, vocabulary) == 64
