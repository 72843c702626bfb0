"""Export: plain transformers loads what a checkpoint holds, bit for bit, or there is no directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from checkpoints import build_manifest, save
from llm_training_toolkit import families
from llm_training_toolkit.checkpoint import CheckpointReader
from llm_training_toolkit.checkpoint.reader import Array
from llm_training_toolkit.config.model_config import LoraConfig
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.export import (
    CheckpointWeights,
    ModelFiles,
    ModelWeights,
    WeightSource,
    atomic_export_dir,
    check_full_model,
    read_source_run_name,
    weights,
    write_model,
)
from llm_training_toolkit.families.lora import build_adapter
from llm_training_toolkit.models import build_model
from llm_training_toolkit.runs.directory import RunDirectory
from machine_limits import no_file_beyond

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
}
UNTIED = QWEN3 | {"tie_word_embeddings": False}
STARCODER2: dict[str, Any] = {key: QWEN3[key] for key in QWEN3 if key != "head_dim"} | {"model_type": "starcoder2"}
QWEN3_MOE = UNTIED | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
CONFIGS = {"qwen3": QWEN3, "qwen3 untied": UNTIED, "qwen3-moe": QWEN3_MOE, "starcoder2": STARCODER2}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OPTIMIZER = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
ONE_END = {"<|endoftext|>": 3}
PROMPT = torch.arange(40).reshape(2, 20)


@dataclass(frozen=True)
class Half:
    """One half of a parameter, so that export has to put something together."""

    name: str
    start: int
    values: Tensor

    @property
    def count(self) -> int:
        return len(self.values)

    def get_tensors(self, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:  # noqa: ARG002 - the protocol
        return {"weights": self.values}


def trained(config: Mapping[str, Any]) -> nn.Module:
    """A model in fp32, as training leaves it: no weight is a round number in bf16."""
    torch.manual_seed(5)
    model = build_model(config, precision="fp32", attention="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def saved(model: nn.Module, directory: Path) -> CheckpointReader:
    """The trained parameters of a model as a checkpoint, in fp32."""
    parameters = {name: each.detach().float() for name, each in model.named_parameters() if each.requires_grad}
    halves = [
        Half(name, start, part.clone())
        for name, tensor in parameters.items()
        for start, part in zip(
            (0, tensor.numel() // 2), tensor.flatten().tensor_split([tensor.numel() // 2]), strict=True
        )
    ]
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    manifest = build_manifest(3, shapes)
    save(RunContext(0, 1, torch.device("cpu")), directory, halves, OPTIMIZER, manifest)
    return CheckpointReader(directory)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"not a file of a tokenizer")
    return folder


@dataclass(frozen=True)
class Case:
    """A trained model, its checkpoint, and where the export goes."""

    config: Mapping[str, Any]
    model: nn.Module
    checkpoint: CheckpointReader
    tokenizer: Path
    destination: Path

    def export(self, precision: str = "fp32", ends: Mapping[str, int] = ONE_END) -> Path:
        beside = ModelFiles(
            self.tokenizer,
            ends,
            pad=7,
            card="# größer\n",
            checkpoint_name=self.checkpoint.directory.name,
            run_name="tiny",
        )
        with atomic_export_dir(self.destination) as directory:
            held = CheckpointWeights(self.checkpoint)
            write_model(held, directory, hf_config=self.config, precision=precision, beside=beside)
            check_full_model(directory, self.checkpoint, self.config, precision)
        return self.destination


class Mixed(CheckpointReader):
    """A checkpoint that gives other weights when it is read a second time."""

    def __init__(self, first: CheckpointReader, second: CheckpointReader) -> None:
        super().__init__(first.directory)
        self._second, self._read = second, set[str]()

    def read(self, name: str, key: str, start: int, count: int) -> Array:
        seen = name in self._read
        self._read.add(name)
        return self._second.read(name, key, start, count) if seen else super().read(name, key, start, count)


def in_precision(case: Case, precision: str) -> nn.Module:
    """The trained model as its forward pass sees it: weights rounded, what is computed from positions in fp32."""
    model = build_model(case.config, precision=precision, attention="sdpa").eval()
    with torch.no_grad():
        for mine, exact in zip(model.parameters(), case.model.parameters(), strict=True):
            mine.copy_(exact)
    return model


def case_of(config: Mapping[str, Any], tmp_path: Path, tokenizer: Path) -> Case:
    model = trained(config)
    checkpoint = saved(model, tmp_path / "step_000000003_a1")
    return Case(config, model, checkpoint, tokenizer, tmp_path / "run" / "export")


@pytest.fixture
def case(tmp_path: Path, tokenizer: Path) -> Case:
    return case_of(QWEN3, tmp_path, tokenizer)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(PROMPT, use_cache=False).logits
    return out


def reloaded(directory: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_reloaded_model_has_the_same_logits_bit_for_bit(
    tmp_path: Path, tokenizer: Path, name: str, precision: str
) -> None:
    case = case_of(CONFIGS[name], tmp_path, tokenizer)
    again = reloaded(case.export(precision))
    assert {parameter.dtype for parameter in again.parameters()} == {DTYPES[precision]}
    assert torch.equal(logits(again), logits(in_precision(case, precision)))


def test_tied_weights_are_stored_once_and_stay_tied(case: Case) -> None:
    directory = case.export()
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in set(file.keys())
    again = reloaded(directory)
    assert again.config.tie_word_embeddings is True
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_untied_weights_stay_apart(tmp_path: Path, tokenizer: Path) -> None:
    again = reloaded(case_of(UNTIED, tmp_path, tokenizer).export())
    assert again.config.tie_word_embeddings is False
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


@pytest.mark.parametrize("limit", [1, 50_000])
def test_a_large_model_is_stored_in_shards(case: Case, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(weights, "_SHARD_BYTES", limit)
    directory = case.export()
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 1
    assert set(index["weight_map"].values()) == set(files)
    assert index["weight_map"].keys() == case.checkpoint.manifest.shapes.keys()
    assert index["metadata"]["total_size"] == 4 * sum(each.numel() for each in case.model.parameters())
    assert torch.equal(logits(reloaded(directory)), logits(case.model))


def test_the_ends_of_texts_stand_in_both_configurations(case: Case) -> None:
    directory = case.export("bf16")
    config = json.loads((directory / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (3, 7)
    assert config.get("bos_token_id") is None
    assert config["model_type"] == "qwen3"
    assert config.get("use_cache", True) is True, "training's switch must not slow generation down"
    assert config["dtype"] == "bfloat16"
    generation = GenerationConfig.from_pretrained(directory)
    assert (generation.eos_token_id, generation.pad_token_id) == (3, 7)


def test_experts_have_the_names_that_are_published(tmp_path: Path, tokenizer: Path) -> None:
    case = case_of(QWEN3_MOE, tmp_path, tokenizer)
    directory = case.export()
    plain: Any = case.model
    plain.save_pretrained(tmp_path / "transformers")
    names = []
    for folder in (directory, tmp_path / "transformers"):
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            names.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    assert names[0].keys() == names[1].keys()
    assert all(torch.equal(names[0][name], names[1][name]) for name in names[0])


def test_a_model_of_conversations_stops_at_the_end_of_its_turn_too(case: Case) -> None:
    directory = case.export(ends={"<|im_end|>": 5, "<|endoftext|>": 3})
    assert GenerationConfig.from_pretrained(directory).eos_token_id == [5, 3]
    assert json.loads((directory / "config.json").read_text())["eos_token_id"] == 5
    assert json.loads((directory / "tokenizer_config.json").read_text()) == {"eos_token": "<|im_end|>"}


def test_weights_that_are_not_the_checkpoints_are_not_exported(case: Case) -> None:
    other = trained(QWEN3)
    with torch.no_grad():
        other.get_output_embeddings().weight[0, 0] += 0.5  # type: ignore[operator]
    elsewhere = case.checkpoint.directory.parent / "step_000000004_a1"
    with pytest.raises(CheckpointError, match=r"does not give the checkpoint's logits"):
        replace(case, checkpoint=Mixed(case.checkpoint, saved(other, elsewhere))).export()
    assert not case.destination.exists()


def test_a_directory_of_something_else_is_left_alone(case: Case) -> None:
    case.destination.mkdir(parents=True)
    (case.destination / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="no earlier export"):
        case.export()
    assert (case.destination / "thesis.tex").read_text() == "years of work"


def test_the_tokenizer_and_the_card_go_along_and_nothing_else(case: Case) -> None:
    directory = case.export()
    assert sorted(path.name for path in directory.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ]
    assert (directory / "README.md").read_text() == "# größer\n"
    assert read_source_run_name(directory) == "tiny"
    assert (directory / "tokenizer.json").read_text() == (case.tokenizer / "tokenizer.json").read_text()


def test_whoever_may_read_the_export_may_read_its_weights(case: Case) -> None:
    directory = case.export()
    rights = {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert set(rights.values()) == {directory.stat().st_mode & 0o666}, rights


def test_an_export_is_synced_before_its_name_says_that_it_is_whole(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a loss of power left the directory, and every file in it empty."""
    synced: set[tuple[str, int]] = set()
    plain = os.fsync

    def record_sync(descriptor: int) -> None:
        assert (
            not case.destination.exists() or Path(f"/proc/self/fd/{descriptor}").readlink() == case.destination.parent
        )
        synced.add((Path(f"/proc/self/fd/{descriptor}").readlink().name, os.fstat(descriptor).st_size))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", record_sync)
    files = list(case.export().iterdir())
    assert {(path.name, path.stat().st_size) for path in files} <= synced
    assert {".export.writing", case.destination.parent.name} <= {name for name, _ in synced}


def test_a_run_replaces_its_own_export_also_a_damaged_one(case: Case) -> None:
    case.export()
    for path in case.destination.iterdir():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no earlier export"):
        case.export()
    RunDirectory(case.destination.parent).resolved_config_path.write_text("{}")
    reloaded(case.export())
    assert sorted(path.name for path in case.destination.parent.iterdir()) == ["export", "resolved.json"]


def test_a_second_export_replaces_the_first_whole(case: Case) -> None:
    directory = case.export()
    (directory / "left over").write_text("")
    case.export("bf16")
    assert not (directory / "left over").exists()
    assert torch.equal(logits(reloaded(directory)), logits(in_precision(case, "bf16")))


def test_what_a_killed_export_left_is_not_in_the_way(case: Case) -> None:
    half = case.destination.with_name(".export.writing")
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert torch.equal(logits(reloaded(case.export())), logits(case.model))
    assert [path.name for path in case.destination.parent.iterdir()] == ["export"]


def test_a_disk_without_room_for_the_weights_leaves_no_directory(case: Case) -> None:
    with no_file_beyond(1_000), pytest.raises(CheckpointError, match=r"export to .* failed: .*free some space"):
        case.export()
    assert list(case.destination.parent.iterdir()) == []


def test_a_disk_without_room_for_the_tokenizer_leaves_no_directory(case: Case) -> None:
    (case.tokenizer / "vocab.json").write_bytes(b"x" * 2_000_000)
    with no_file_beyond(1_000_000), pytest.raises(CheckpointError, match=r"export to .* failed: .*free some space"):
        case.export()
    assert list(case.destination.parent.iterdir()) == []
    assert case.checkpoint.verify_files() == []


def test_a_failed_export_leaves_the_one_before(case: Case) -> None:
    directory = case.export()
    (case.tokenizer / "vocab.json").write_bytes(b"x" * 2_000_000)
    with no_file_beyond(1_000_000), pytest.raises(CheckpointError):
        case.export("bf16")
    assert torch.equal(logits(reloaded(directory)), logits(case.model))


@pytest.mark.parametrize(
    "size", {each.family.name: each for each in families.SIZES.values()}.values(), ids=lambda size: size.family.name
)
def test_merging_into_a_mixture_may_move_tokens_to_other_experts(size: families.ModelSize) -> None:
    """The configuration is the one of a checkpoint, in which transformers names the experts as it likes."""
    from llm_training_toolkit.export.adapters import get_merge_tolerance

    saved = AutoConfig.for_model(size.family.model_type, **size.hf_values).to_dict()
    is_mixture = "num_experts" in size.hf_values
    assert is_mixture == ("moe" in size.family.model_type or size.family.name == "qwen3-next")
    assert get_merge_tolerance(saved, "bf16") == (1.0 if is_mixture else 0.1)
    assert get_merge_tolerance(saved, "fp32") == 1e-4


@pytest.mark.parametrize("learnt", [1e-3, 0.2])
@pytest.mark.parametrize("kind", ["linear", "dora", "experts"])
def test_merged_adapters_are_told_from_a_base_they_hardly_change(
    tmp_path: Path, tokenizer: Path, kind: str, learnt: float
) -> None:
    from llm_training_toolkit.export.adapters import MergedWeights, check_adapters, get_merge_tolerance
    from llm_training_toolkit.models.lora import add_adapters

    config = (QWEN3_MOE if kind == "experts" else UNTIED) | {"attention_bias": False}
    tensors: Any = ("gate_up_proj", "down_proj") if kind == "experts" else ()
    size = families.find_size("qwen3-30b-a3b" if kind == "experts" else "qwen3-0.6b")
    lora = LoraConfig(rank=4, use_dora=kind == "dora", target_parameters=tensors)
    adapter = build_adapter(lora, size.family, families.read_model_dims(config))
    whole: Any = trained(config).to(torch.bfloat16)
    whole.save_pretrained(tmp_path / "base")
    how: dict[str, Any] = {"precision": "bf16", "attention": "sdpa", "path": str(tmp_path / "base")}
    model = build_model(config, **how)
    add_adapters(model, adapter, seed=0, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=learnt)
    checkpoint, base = saved(model, tmp_path / "step_000000003_a1"), build_model(config, **how)
    beside = ModelFiles(tokenizer, ONE_END, pad=7, card="", checkpoint_name="step_000000003_a1", run_name="tiny")
    limit = get_merge_tolerance(config, "bf16")

    def check(weights: WeightSource, directory: Path) -> float:
        directory.mkdir()
        write_model(weights, directory, hf_config=config, precision="bf16", beside=beside)
        given: dict[str, Any] = {"base": how["path"], "hf_config": config, "precision": "bf16", "tolerance": limit}
        return check_adapters(directory, checkpoint, adapter, **given)

    assert check(MergedWeights(base, checkpoint, adapter), tmp_path / "merged") < limit
    with pytest.raises(CheckpointError, match=r"_proj\.weight is not what its adapter makes of it"):
        check(ModelWeights(base), tmp_path / "unmerged")
