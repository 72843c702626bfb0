"""Adapters beside a model in 4 bits (QLoRA), on a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launching import command, run_of
from llm_training_toolkit.export.export_run import export_run
from run_results import list_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="4-bit weights need a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
]
SECTIONS: dict[str, dict[str, Any]] = {
    "train": {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "precision": "bf16"},
    "cluster": {"workers": 0},
    "export": {"at_end": True},
}


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_model_in_four_bits_trains_nearly_as_a_whole_one(launch_config: Callable[..., Path], zero: int) -> None:
    engine = {"engine": {"zero_stage": zero}}
    plain = launch_config(f"plain_{zero}", **SECTIONS | engine | {"model": {"lora": {"rank": 4}}})
    packed = launch_config(f"packed_{zero}", **SECTIONS | engine | {"model": {"lora": {"rank": 4, "quantize": "nf4"}}})
    for config in (plain, packed):
        subprocess.run(command(config, "train.steps=3"), check=True, capture_output=True)
        subprocess.run(command(config, "--extend"), check=True, capture_output=True)
    assert len(list_losses(run_of(packed))) == SECTIONS["train"]["steps"]
    assert list_losses(run_of(packed)) == pytest.approx(list_losses(run_of(plain)), rel=0.02)
    assert list_losses(run_of(packed)) != list_losses(run_of(plain))
    assert (run_of(packed).export_dir / "adapter_model.safetensors").is_file()
    merged = export_run(run_of(packed), step=None, merge=True, out=None, say=print)
    assert merged.difference < 0.05
