"""Under ZeRO-3 weights are loaded in pieces: the same ones, refused for the same reasons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rank_tasks
from llm_training_toolkit.errors import CheckpointError
from rank_pool import RankPool
from unit.models.test_check_weights import MODELS, QWEN3, published

Pools = Callable[[int], RankPool]


def loaded(pools: Pools, config: dict[str, Any], path: Path, rows: int | None = None) -> list[dict[str, Any]]:
    return pools(2).run(rank_tasks.load_base_weights, hf_config=config, path=str(path), zero=3, rows=rows)


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_has_its_part_of_what_was_published(pools: Pools, tmp_path: Path, name: str) -> None:
    wanted = published(MODELS[name], tmp_path)
    for found in loaded(pools, MODELS[name], tmp_path):
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[key], wanted[key].numpy()) for key in wanted)


@pytest.mark.parametrize("name", MODELS)
def test_new_rows_are_the_mean_of_the_old_on_every_rank(pools: Pools, tmp_path: Path, name: str) -> None:
    wanted = published(MODELS[name], tmp_path)
    for found in loaded(pools, MODELS[name], tmp_path, rows=576):
        assert found.keys() == wanted.keys()
        for key, before in wanted.items():
            assert np.array_equal(found[key][: len(before)], before.numpy()), key
            if len(found[key]) > len(before):
                mean = before.mean(dim=0).expand(64, -1).numpy()
                np.testing.assert_allclose(found[key][512:], mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, r"missing_keys: model\.layers\.1\.mlp\.up_proj"),
        ({"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)}, r"unexpected_keys: model\.layers\.2\.mlp"),
        ({"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 32)}, r"mismatched_keys: .*layers\.1\.mlp\.up_proj"),
        ({"lm_head.weight": torch.zeros(512, 32)}, r"tied by config\.json, but different"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    pools: Pools, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    published(QWEN3, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        loaded(pools, QWEN3, tmp_path)
