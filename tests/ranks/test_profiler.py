"""`profile.steps` leaves a trace of every rank, with the parts of a step in it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable

import rank_tasks
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool

PARTS = {"ProfilerStep#2", "ProfilerStep#3", "read data", "forward", "backward", "update weights"}


def test_every_rank_leaves_a_trace_of_the_steps(
    pools: Callable[[int], RankPool], fresh_run: Callable[[str], RunDirectory]
) -> None:
    run = fresh_run("profiled")
    changes = {"profile": {"steps": [2, 3]}, "train": {"steps": 4, "global_batch_size": 2}, "optim": {"warmup": 1}}
    answers = pools(2).run(rank_tasks.train_run, run=str(run.path), changes=changes)
    assert [answer["status"] for answer in answers] == ["finished"] * 2
    traces = sorted(run.get_profile_dir(1).iterdir())
    assert [path.name for path in traces] == ["rank_0.pt.trace.json.gz", "rank_1.pt.trace.json.gz"]
    for path in traces:
        names = {str(event.get("name")) for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        assert names >= PARTS
        assert not names & {"ProfilerStep#1", "ProfilerStep#4"}
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    speeds = [row["perf/tflops"] for row in rows if "train/loss" in row]
    assert len(speeds) == 4
    assert min(speeds) > 0
    assert not any("perf/mfu" in row for row in rows)  # no peak is published for these processors
