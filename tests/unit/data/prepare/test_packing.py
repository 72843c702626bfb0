"""Packing: every example once, none cut, the same for the same seed, tight and fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.data.prepare.packing import PackingPlan, pack_examples, pack_in_windows
from llm_training_toolkit.errors import DataError


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each sequence, one example after the other, as the textbook has it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(
    lengths=st.lists(st.integers(1, 40), max_size=120),
    capacity=st.integers(40, 64),
    seed=st.integers(0),
    epoch=st.integers(0, 9),
)
def test_every_example_lies_whole_in_exactly_one_sequence(
    lengths: list[int], capacity: int, seed: int, epoch: int
) -> None:
    targets = np.array(lengths, dtype=np.int64) - 1
    plan = pack_examples(np.array(lengths, dtype=np.int64), capacity, targets=targets, seed=seed, epoch=epoch)
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in plan.get_examples(s)) for s in range(len(plan))]
    assert all(0 < fill <= capacity for fill in filled)
    assert plan.targets.tolist() == [sum(lengths[i] - 1 for i in plan.get_examples(s)) for s in range(len(plan))]
    assert sorted(capacity - fill for fill in filled) == best_fit_decreasing(lengths, capacity)
    again = pack_examples(np.array(lengths, dtype=np.int64), capacity, targets=targets, seed=seed, epoch=epoch)
    assert plan.order.tolist() == again.order.tolist()


def test_seed_and_epoch_change_the_order_and_mix_equal_lengths() -> None:
    lengths = np.full(400, 8)
    plans = [
        pack_examples(lengths, 32, targets=lengths, seed=seed, epoch=epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    assert len({tuple(plan.order.tolist()) for plan in plans}) == 3
    from_first_half = [int((plans[0].get_examples(s) < 200).sum()) for s in range(100)]
    assert 20 < sum(count == 2 for count in from_first_half) < 60


def test_the_order_is_the_same_in_every_version() -> None:
    lengths = np.array([5, 3, 3, 2, 7, 1, 3, 5])
    plan = pack_examples(lengths, 8, targets=lengths - 1, seed=8, epoch=2)
    assert plan.order.tolist() == [0, 6, 4, 5, 7, 2, 1, 3]
    assert plan.offsets.tolist() == [0, 2, 4, 6, 8]
    assert plan.targets.tolist() == [6, 6, 6, 3]


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=300), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_windows_hold_every_example_once_and_nothing_of_other_windows(counts: list[int], seed: int, epoch: int) -> None:
    shards = np.repeat(np.arange(len(counts)), counts)
    lengths = np.random.default_rng(seed).integers(1, 17, len(shards))
    plan = pack_in_windows(shards, lengths, 16, targets=lengths - 1, seed=seed, epoch=epoch)
    assert sorted(plan.order.tolist()) == list(range(len(shards)))
    assert plan.targets.tolist() == [int((lengths[plan.get_examples(s)] - 1).sum()) for s in range(len(plan))]
    assert all(lengths[plan.get_examples(s)].sum() <= 16 for s in range(len(plan)))


def test_shards_are_read_a_window_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = np.repeat(np.arange(200), 50)
    lengths = np.random.default_rng(0).integers(1, 65, len(shards))
    monkeypatch.setattr("llm_training_toolkit.data.prepare.packing._WINDOW_TOKENS", int(lengths.sum()) // 4 + 1)
    plan, other = (pack_in_windows(shards, lengths, 64, targets=lengths, seed=1, epoch=epoch) for epoch in (0, 1))
    seen = shards[plan.order]
    first = {int(shard): place for place, shard in reversed(list(enumerate(seen)))}
    last = {int(shard): place for place, shard in enumerate(seen)}
    needed_at_once = [sum(first[s] <= place <= last[s] for s in first) for place in range(0, len(seen), 50)]
    assert max(needed_at_once) <= 52  # a quarter of the shards, and what a cut at a whole shard adds
    assert list(first) != list({int(shard): 0 for shard in shards[other.order]})
    assert lengths.sum() / (len(plan) * 64) > 0.99


def test_many_small_shards_are_one_window() -> None:
    shards = np.repeat(np.arange(500), 20)  # five hundred small sources, for example
    lengths = np.random.default_rng(0).integers(1, 65, len(shards))
    plan = pack_in_windows(shards, lengths, 64, targets=lengths, seed=1, epoch=0)
    assert (plan.order == pack_examples(lengths, 64, targets=lengths, seed=1, epoch=0).order).all()


def test_fifty_thousand_lengths_leave_less_than_a_hundredth_empty() -> None:
    lengths = np.random.default_rng(0).integers(1, 2049, 50_000)
    plan = pack_examples(lengths, 2048, targets=lengths - 1)
    assert lengths.sum() / (len(plan) * 2048) > 0.99


TEN_MILLION = """
import resource
import numpy as np
from llm_training_toolkit.data.prepare.packing import pack_examples

lengths = np.minimum(np.random.default_rng(0).lognormal(6.0, 1.1, 10_000_000).astype(np.int64) + 1, 2048)
plan = pack_examples(lengths, 2048, targets=lengths - 1)
print(lengths.sum() / (len(plan) * 2048), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


@pytest.mark.slow
def test_ten_million_lengths_need_less_than_two_gigabytes() -> None:
    done = subprocess.run([sys.executable, "-c", TEN_MILLION], capture_output=True, text=True, check=True)
    filled, peak_gb = map(float, done.stdout.split())
    assert filled > 0.9999
    assert peak_gb < 2.0


def test_lengths_outside_the_sequence_are_refused() -> None:
    for wrong in ([3, 9], [0, 3]):
        with pytest.raises(DataError, match="8"):
            pack_examples(np.array(wrong), 8, targets=np.array(wrong))


@pytest.mark.parametrize("count", [0, 1, 30])
def test_a_plan_survives_the_disk(tmp_path: Path, count: int) -> None:
    lengths = np.arange(1, count + 1)
    plan = pack_examples(lengths, 30, targets=lengths - 1, seed=3)
    plan.write(tmp_path)
    read = PackingPlan.read(tmp_path)
    for name in ("order", "offsets", "targets"):
        assert getattr(read, name).tolist() == getattr(plan, name).tolist()
