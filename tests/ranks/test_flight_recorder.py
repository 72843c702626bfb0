"""The flight record of every rank: its last collectives, by torch's recorder, at the place for them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import rank_tasks
from llm_training_toolkit.distributed.flight_recorder import get_flight_record_path
from rank_pool import RankPool


def test_every_rank_writes_its_last_collectives(pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    pools(2).run(rank_tasks.record_collectives, directory=str(tmp_path), variables={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flight_record_rank_0", "flight_record_rank_1"]
    for rank in (0, 1):
        record = pickle.loads(get_flight_record_path(tmp_path, rank).read_bytes())
        last = record["entries"][-1]
        assert last["profiling_name"] == "gloo:all_reduce"
        assert any(frame["name"] == "all_reduce_sum" for frame in last["frames"])


def test_a_place_that_a_person_set_is_kept(pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    variables = {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(tmp_path / "mine" / "trace_")}
    pools(2).run(rank_tasks.record_collectives, directory=str(tmp_path), variables=variables)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["trace_0", "trace_1"]
