"""Estimated speeds against published ones: a part to which the constants were fitted, and a part held out."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

import pytest

from llm_training_toolkit import families
from llm_training_toolkit.families import ModelDims
from llm_training_toolkit.families.flops import compute_training_flops
from llm_training_toolkit.plan.forecast.utilisation import ComputeWorkload, Kernels, Launches, estimate_pass_seconds
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing, count_recomputed_flops

PEAKS = {"A100": (312e12, 2.04e12), "H100": (989e12, 3.35e12), "H100 HBM2e": (989e12, 2.4e12)}
"""FLOP/s in bf16 and bytes per second; the last is torchtitan's card of 500 W."""


def build_dims(vocab: int, hidden: int, layers: int, kv_width: int, intermediate: int, *, tied: bool) -> ModelDims:
    """Dimensions of a model with heads of 128; without a gate if the feed-forward layer is four times as wide."""
    return ModelDims(
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        heads=hidden // 128,
        kv_heads=kv_width // 128,
        head_dim=128,
        intermediate=intermediate,
        gated=intermediate != 4 * hidden,
        tied=tied,
        vectors_per_layer=0,
        vectors_outside=0,
    )


def read_size(name: str) -> ModelDims:
    size = families.find_size(name)
    return families.read_model_dims({**size.hf_values, "model_type": size.family.model_type})


MODELS = {
    "Qwen-1.8B": build_dims(151936, 2048, 24, 2048, 5504, tied=False),
    "Qwen-7B": build_dims(151936, 4096, 32, 4096, 11008, tied=False),
    "Llama-3.1-8B": build_dims(128256, 4096, 32, 1024, 14336, tied=False),
    "MPT-1B": build_dims(50368, 2048, 24, 2048, 8192, tied=True),
    "MPT-7B": build_dims(50368, 4096, 32, 4096, 16384, tied=True),
    "MPT-760M": build_dims(50368, 1536, 24, 1536, 6144, tied=True),
    "MPT-3B": build_dims(50368, 2560, 32, 2560, 10240, tied=True),
    "MPT-13B": build_dims(50368, 5120, 40, 5120, 20480, tied=True),
    "MPT-30B": build_dims(50368, 7168, 48, 7168, 28672, tied=True),
    "MPT-70B": build_dims(50368, 8192, 80, 8192, 32768, tied=True),
    "TinyLlama": build_dims(32000, 2048, 22, 256, 5632, tied=False),
    "Qwen2.5-7B": read_size("qwen2.5-7b"),
    "StarCoder2-3B": read_size("starcoder2-3b"),
}


@dataclass(frozen=True)
class Published:
    """Tokens a second and GPU."""

    model: str
    device: str
    length: int
    rows: int
    method: Literal["full", "LoRA"]
    checkpointing: ActivationCheckpointing
    kernels: Kernels
    speed: float
    fitted: bool = False
    launches: Launches = "plain"

    def estimate(self) -> float:
        """Return the estimated tokens a second; exchanges count as hidden by computation."""
        model = MODELS[self.model]
        flops = compute_training_flops(model)
        forward = flops.count_step_flops(1, 1, self.length) / 3
        frozen = 2 * model.matmul_parameters if self.method == "LoRA" else 0  # no gradient of the weights
        total = 3 * forward - frozen + count_recomputed_flops(self.checkpointing, model, None, forward)
        attention = flops.per_attended_token * self.length * (4 / 3 if self.checkpointing == "full" else 1)
        load = ComputeWorkload(
            product_flops=total - attention,
            attention_flops=attention,
            hidden=model.hidden,
            layers=model.layers,
            pass_tokens=self.rows * self.length,
            launches=self.launches,
            recomputes=self.checkpointing != "none",
            kernels=self.kernels,
        )
        peak, bandwidth = PEAKS[self.device]
        return load.pass_tokens / estimate_pass_seconds(load, peak, peak / bandwidth)

    @property
    def error(self) -> float:
        """Relative error of the estimate."""
        return self.estimate() / self.speed - 1


def list_qwen_profile() -> list[Published]:
    """QwenLM/Qwen README.md, "Profiling of Memory and Speed": s for 8 passes of one row, PyTorch 2.0, FlashAttention 2.

    Gradient checkpointing as in its scripts, which take ZeRO 3 for full training; two GPUs for 7B.
    """
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    table: list[tuple[str, Literal["full", "LoRA"], Launches, set[int], tuple[float, ...]]] = [
        ("Qwen-1.8B", "LoRA", "plain", {256, 1024, 4096}, (1.0, 1.0, 1.1, 1.7, 3.3, 6.8)),
        ("Qwen-1.8B", "full", "sharded", {256, 4096}, (2.1, 2.2, 2.2, 2.3, 2.8, 5.6)),
        ("Qwen-7B", "LoRA", "plain", {256, 1024, 4096}, (1.2, 1.5, 2.8, 5.2, 10.1, 21.3)),
        ("Qwen-7B", "LoRA", "quantized", {256, 4096}, (3.0, 3.0, 3.5, 7.0, 11.6, 22.3)),
        ("Qwen-7B", "full", "sharded", set(), (4.0, 4.0, 4.5)),
    ]
    return [
        Published(model, "A100", length, 1, method, "full", "eager", 8 * length / each, length in fitted, launches)
        for model, method, launches, fitted, seconds in table
        for length, each in zip(lengths, seconds, strict=False)
    ]


PUBLISHED = [
    *list_qwen_profile(),
    # torchtitan benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3: 8 and 128 GPUs.
    Published("Llama-3.1-8B", "H100 HBM2e", 8192, 2, "full", "selective", "eager", 5762, fitted=True),
    Published("Llama-3.1-8B", "H100 HBM2e", 8192, 2, "full", "selective", "fused", 6667, fitted=True),
    Published("Llama-3.1-8B", "H100 HBM2e", 8192, 2, "full", "selective", "eager", 5605),
    Published("Llama-3.1-8B", "H100 HBM2e", 8192, 2, "full", "selective", "fused", 6514),
    # NeMo Automodel docs/performance-summary.mdx, LoRA on one GPU.
    Published("Qwen2.5-7B", "H100", 4096, 2, "LoRA", "none", "fused", 14110, fitted=True),
    Published("Llama-3.1-8B", "H100", 4096, 2, "LoRA", "none", "fused", 12473),
    # LLM Foundry scripts/train/benchmarking/README.md, bf16; 8 GPUs, 70B on 64.
    Published("MPT-7B", "H100", 2048, 6, "full", "none", "fused", 10643, fitted=True),
    Published("MPT-7B", "H100", 4096, 16, "full", "full", "fused", 8611, fitted=True),
    Published("MPT-7B", "H100", 32768, 2, "full", "full", "fused", 3318, fitted=True),
    Published("MPT-1B", "H100", 4096, 7, "full", "none", "fused", 38535, fitted=True),
    Published("MPT-7B", "H100", 1024, 64, "full", "full", "fused", 10203),
    Published("MPT-7B", "H100", 8192, 8, "full", "full", "fused", 6935),
    Published("MPT-1B", "H100", 2048, 14, "full", "none", "fused", 45455),
    Published("MPT-1B", "H100", 8192, 3, "full", "none", "fused", 29157),
    Published("MPT-70B", "H100", 2048, 8, "full", "full", "fused", 1039),
    # Fast-LLM README (10k tokens/s), litgpt tutorials/pretrain_tinyllama.md (24k tokens/s).
    Published("StarCoder2-3B", "A100", 4096, 1, "full", "none", "fused", 10000),
    Published("TinyLlama", "A100", 2048, 1, "full", "none", "fused", 24000),
]
UNSEEN = [
    # LLM Foundry's table again, H100 in bf16 with 8 GPUs: looked at after formula and constants were settled.
    Published("MPT-760M", "H100", 2048, 24, "full", "none", "fused", 63147),
    Published("MPT-3B", "H100", 1024, 20, "full", "none", "fused", 27046),
    Published("MPT-3B", "H100", 4096, 5, "full", "none", "fused", 20964),
    Published("MPT-3B", "H100", 8192, 3, "full", "none", "fused", 16578),
    Published("MPT-3B", "H100", 16384, 1, "full", "none", "fused", 11152),
    Published("MPT-13B", "H100", 2048, 2, "full", "none", "fused", 4792),
    Published("MPT-13B", "H100", 4096, 10, "full", "full", "fused", 4717),
    Published("MPT-13B", "H100", 16384, 3, "full", "full", "fused", 2985),
    Published("MPT-30B", "H100", 1024, 6, "full", "full", "fused", 2084),
    Published("MPT-30B", "H100", 2048, 3, "full", "full", "fused", 2002),
    Published("MPT-30B", "H100", 4096, 1, "full", "full", "fused", 1802),
    Published("MPT-30B", "H100", 8192, 1, "full", "full", "fused", 1384),
]
PARTS = {
    "fitted": [each for each in PUBLISHED if each.fitted],
    "held out": [each for each in PUBLISHED if not each.fitted],
    "unseen": UNSEEN,
}


@pytest.mark.parametrize("part", PARTS)
def test_estimates_are_near_published_speeds(part: str) -> None:
    errors = [abs(each.error) for each in PARTS[part]]
    assert len(errors) >= 12
    assert statistics.median(errors) <= 0.15
    assert max(errors) <= 0.40


def test_one_constant_is_worse() -> None:
    """0.34 of the peak, by the same FLOPs."""
    errors = []
    for each in PUBLISHED:
        model, peak = MODELS[each.model], PEAKS[each.device][0]
        forward = compute_training_flops(model).count_step_flops(1, 1, each.length) / 3
        frozen = 2 * model.matmul_parameters if each.method == "LoRA" else 0
        flops = 3 * forward - frozen + count_recomputed_flops(each.checkpointing, model, None, forward)
        errors.append(abs(0.34 * peak / flops / each.speed - 1))
    assert statistics.median(errors) > 0.2
    assert max(errors) > 2
