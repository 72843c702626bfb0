"""Pretrained weights below ZeRO 3: read by one rank of a node, refused by all ranks together, the bits of the files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import streaming
from rank_pool import RankPool
from unit.models.test_check_weights import LANGUAGE_MODELS, MODELS, QWEN3
from vision_language import save_vision_language_model

Pools = Callable[[int], RankPool]
NODES = ["a", "a", "b"]
"""Of ranks 0, 1 and 2."""


def publish(hf_config: dict[str, Any], directory: Path, shard: str, dtype: torch.dtype = torch.float32) -> int:
    """Write random weights in files of at most `shard`; their number."""
    torch.manual_seed(1)
    if hf_config in LANGUAGE_MODELS.values():
        save_vision_language_model(hf_config, directory)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config), dtype=dtype)
        model.save_pretrained(directory, max_shard_size=shard)
    return len(list(directory.glob("*.safetensors")))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS | LANGUAGE_MODELS)
def test_streamed_weights_equal_those_transformers_loads(
    pools: Pools, tmp_path: Path, name: str, precision: str
) -> None:
    hf_config = (MODELS | LANGUAGE_MODELS)[name]
    assert publish(hf_config, tmp_path, "40KB") >= (1 if name in LANGUAGE_MODELS else 3)
    given: dict[str, Any] = {"hf_config": hf_config, "directory": str(tmp_path), "precision": precision}
    assert pools(3).run(streaming.differences, nodes=NODES, **given) == [[], [], []]


def test_one_rank_reads_and_memory_is_the_model_and_one_tensor(pools: Pools, tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8192, "num_hidden_layers": 8, "head_dim": 64}
    hf_config = QWEN3 | shape | {"num_attention_heads": 8, "num_key_value_heads": 8}
    assert publish(hf_config, tmp_path, "20MB", torch.bfloat16) >= 4
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    largest = 2 * 8192 * 512
    reader, other = pools(2).run(streaming.memory_and_reads, hf_config=hf_config, directory=str(tmp_path))
    for peak, _ in (reader, other):
        # The model in fp32, and the largest tensor of the files in bf16; the rest for gaps between freed buffers.
        # Mapped by transformers it was 2.8 times the files' size.
        assert peak < 2.5 * size + largest
    assert size <= reader[1] < 1.02 * size
    assert other[1] < 0.02 * size


@pytest.mark.parametrize(
    ("truncate", "said"),
    [
        (None, "no weights can be loaded from there"),
        ("model-00002-of-00003.safetensors", "ends at byte"),
        ("model-00001-of-00003.safetensors", "ends at byte"),
    ],
)
def test_a_damaged_file_of_one_reader_ends_every_rank(
    pools: Pools, tmp_path: Path, truncate: str | None, said: str
) -> None:
    """Before the load: the file of rank 2, the reader of node b. During the load: a file of rank 0."""
    assert publish(QWEN3, tmp_path / "a", "40KB") == 3
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    if truncate is None:
        file = tmp_path / "b" / "model-00002-of-00003.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    directories = [str(tmp_path / node) for node in NODES]
    found = pools(3).run(streaming.refusals, hf_config=QWEN3, directories=directories, nodes=NODES, truncate=truncate)
    assert len(set(found)) == 1
    assert found[0].startswith("CheckpointError: ")
    assert said in found[0]


@pytest.mark.parametrize("after", [0, 3])
def test_an_error_between_two_tensors_is_raised_on_every_rank(pools: Pools, tmp_path: Path, after: int) -> None:
    """Rank 0, which waits for its neighbour's part of the next tensor, stops there; rank 2 is another machine's."""
    publish(QWEN3, tmp_path, "1GB")
    given: dict[str, Any] = {"hf_config": QWEN3, "directory": str(tmp_path), "nodes": NODES, "after": after}
    (zero, loaded_by_zero), (one, loaded_by_one), (two, loaded_by_two) = pools(3).run(streaming.failed_cast, **given)
    assert one == f"CheckpointError: model.path = {tmp_path}: the weights cannot be loaded: no memory for the cast"
    assert zero == two == one
    assert (loaded_by_zero, loaded_by_one) == (after, after)
    assert loaded_by_two == len(load_file(tmp_path / "model.safetensors"))


def test_a_tensor_missing_on_one_node_is_named_on_every_rank(pools: Pools, tmp_path: Path) -> None:
    publish(QWEN3, tmp_path / "a", "1GB")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    directories = [str(tmp_path / node) for node in NODES]
    found = pools(3).run(streaming.refusals, hf_config=QWEN3, directories=directories, nodes=NODES)
    assert len(set(found)) == 1
    assert "missing_keys: model.layers.1.mlp.up_proj.weight (1 in all)" in found[0]
