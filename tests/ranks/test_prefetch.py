"""The rows of a step are read while the step before computes, so that slow storage costs no time of its own."""

from __future__ import annotations

from collections.abc import Callable

import prefetching
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool


def test_the_next_step_is_read_while_this_one_computes(
    pools: Callable[[int], RankPool], fresh_run: Callable[[str], RunDirectory]
) -> None:
    [met] = pools(1).run(
        prefetching.train_while_data_waits,
        run=str(fresh_run("slow").path),
        changes={"engine": {"zero_stage": 0}},
        steps=5,
    )
    assert met == [1, 2, 3, 4]
