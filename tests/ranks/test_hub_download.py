"""Weights by their hub id: one rank of a node fetches them from a server that speaks the hub's protocol."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rank_tasks
from hub_server import hub
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool

NODES = ["a", "a", "b"]
"""Of ranks 0, 1 and 2."""
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FILES = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps({"weight_map": dict(zip("xy", SHARDS, strict=True))}).encode(),
    **{shard: shard.encode() * 1000 for shard in SHARDS},
    "pytorch_model.bin": b"the same once more",
}
WANTED = sorted(set(FILES) - {"pytorch_model.bin"})


def test_a_node_fetches_once_and_a_second_start_nothing(
    pools: Callable[[int], RankPool], prepared_run: RunDirectory, tmp_path: Path
) -> None:
    sent: list[str] = []
    homes = [str(tmp_path / node) for node in NODES]
    with hub("tiny/model", FILES, "models", sent) as endpoint:
        given: dict[str, Any] = {"run": str(prepared_run.path), "path": "tiny/model", "nodes": NODES, "homes": homes}
        first = pools(3).run(rank_tasks.download_weights, endpoint=endpoint, **given)
        assert Counter(sent) == dict.fromkeys(WANTED, 2), "once for each of two nodes"
        again = pools(3).run(rank_tasks.download_weights, endpoint="http://127.0.0.1:1", **given)
    assert again == first
    assert first[0] == first[1] != first[2]
    for home, directory in zip(homes, first, strict=True):
        assert Path(directory).is_relative_to(home)
        assert {name: Path(directory, name).read_bytes() for name in WANTED} == {name: FILES[name] for name in WANTED}


def test_nodes_that_share_a_home_fetch_once_together(
    pools: Callable[[int], RankPool], prepared_run: RunDirectory, tmp_path: Path
) -> None:
    sent: list[str] = []
    with hub("tiny/model", FILES, "models", sent) as endpoint:
        homes = [str(tmp_path / "shared")] * 3
        given: dict[str, Any] = {"run": str(prepared_run.path), "path": "tiny/model", "nodes": NODES, "homes": homes}
        found = pools(3).run(rank_tasks.download_weights, endpoint=endpoint, **given)
    assert sorted(sent) == WANTED
    assert len(set(found)) == 1


def test_weights_that_are_half_there_are_completed(
    pools: Callable[[int], RankPool], prepared_run: RunDirectory, tmp_path: Path
) -> None:
    """As a tokenizer of the same repository leaves them, or a fetch that was cut short."""
    sent: list[str] = []
    homes = [str(tmp_path)] * 3
    with hub("tiny/model", FILES, "models", sent) as endpoint:
        given: dict[str, Any] = {"run": str(prepared_run.path), "path": "tiny/model", "nodes": NODES, "homes": homes}
        [directory, *_] = pools(3).run(rank_tasks.download_weights, endpoint=endpoint, **given)
        Path(directory, SHARDS[1]).resolve().unlink()
        Path(directory, SHARDS[1]).unlink()
        sent.clear()
        pools(3).run(rank_tasks.download_weights, endpoint=endpoint, **given)
    assert sent == [SHARDS[1]]


@pytest.mark.parametrize(
    ("path", "homes", "words"),
    [
        ("tiny/absent", ["one", "one", "one"], r"model\.path = tiny/absent: .*hub did not give it .*rank [02] on node"),
        ("tiny/model", ["one", "two", "one"], "some ranks of node a do not see what another rank there has fetched"),
        ("/no/such/place", ["one", "one", "one"], "/no/such/place: neither a directory here nor an id of the hub"),
    ],
)
def test_weights_that_cannot_be_had_end_every_rank_with_the_cause(
    pools: Callable[[int], RankPool],
    prepared_run: RunDirectory,
    tmp_path: Path,
    path: str,
    homes: list[str],
    words: str,
) -> None:
    places = [str(tmp_path / home) for home in homes]
    given: dict[str, Any] = {"run": str(prepared_run.path), "path": path, "nodes": NODES, "homes": places}
    with hub("tiny/model", FILES, "models") as endpoint, pytest.raises(CheckpointError, match=words):
        pools(3).run(rank_tasks.download_weights, endpoint=endpoint, **given)
