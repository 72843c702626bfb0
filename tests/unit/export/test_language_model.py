"""The language model of a vision-language checkpoint, and a mixture with a shared expert, as exports that reload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_training_toolkit import families
from llm_training_toolkit.config import parse_config
from llm_training_toolkit.export.directory import ModelFiles
from llm_training_toolkit.export.weights import ModelWeights, write_model
from llm_training_toolkit.models import build_model, check_pretrained_weights
from tiny_models import SHAPES
from vision_language import save_vision_language_model


def hf_config(name: str) -> dict[str, Any]:
    raw = {
        "run": {"name": "a"},
        "model": {"name": name, "config_overrides": {**SHAPES[name], "vocab_size": 256}},
        "tokenizer": {"path": "a"},
        "data": {"sequence_length": 64, "sources": [{"path": "a", "format": "code"}]},
        "train": {"steps": 1},
    }
    return families.resolve_hf_config(parse_config(raw, "test"))


@pytest.mark.parametrize("name", ["qwen3.5-4b", "qwen3.5-35b-a3b", "qwen2-57b-a14b"])
def test_an_export_reloads_with_the_logits_of_the_weights_it_began_with(name: str, tmp_path: Path) -> None:
    hf, published, export = hf_config(name), tmp_path / "published", tmp_path / "export"
    if hf["model_type"].endswith("_text"):
        save_vision_language_model(hf, published)
    else:
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf)).save_pretrained(published)
    check_pretrained_weights(str(published), hf["model_type"])
    model: Any = build_model(hf, precision="fp32", attention="sdpa", path=str(published)).eval()
    export.mkdir()
    (tmp_path / "tokenizer").mkdir()
    beside = ModelFiles(
        tmp_path / "tokenizer", {"<|endoftext|>": 0}, pad=0, card="", checkpoint_name="step_1", run_name="tiny"
    )
    write_model(ModelWeights(model), export, hf_config=model.config.to_dict(), precision="fp32", beside=beside)
    saved = json.loads((export / "config.json").read_text())
    assert saved["architectures"] == [families.find_size(name).family.architecture]
    assert saved["rope_parameters"] == hf["rope_parameters"]
    reloaded, info = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        found, wanted = reloaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits
    # Not bit for bit: products of a few rows round by the alignment of the weights in memory.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
