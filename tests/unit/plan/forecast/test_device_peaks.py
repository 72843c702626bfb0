"""Published peaks are found by the name of the driver."""

from __future__ import annotations

import pytest

from llm_training_toolkit.plan.forecast.device_peaks import find_device_peak
from unit.plan.forecast.test_cluster_estimate import hardware


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA GH200 480GB", 989, 67),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 835, 60),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA A10G", 70, 31.5),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("Tesla V100-PCIE-32GB", None, 14),
        ("Tesla T4", None, 8.1),
    ],
)
def test_the_peak_of_a_card_is_found_by_its_name(name: str, bf16: float | None, fp32: float) -> None:
    found = find_device_peak(name)
    assert found is not None
    assert found.source
    assert found.get_flops("bf16") == (None if bf16 is None else bf16 * 1e12)
    assert found.get_flops("fp32") == fp32 * 1e12


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35),
        ("NVIDIA H100 NVL", 3.9),
        ("NVIDIA H200", 4.8),
        ("NVIDIA H200 NVL", 4.8),
        ("NVIDIA GH200 480GB", 4.0),
        ("NVIDIA GH200 144G HBM3e", 4.9),
        ("NVIDIA A100-SXM4-40GB", 1.555),
        ("NVIDIA A100-PCIE-40GB", 1.555),
        ("NVIDIA A100-SXM4-80GB", 2.039),
        ("NVIDIA A100 80GB PCIe", 1.935),
    ],
)
def test_cards_with_the_same_processor_have_their_own_memory(name: str, bandwidth: float) -> None:
    found = find_device_peak(name)
    assert found is not None
    assert found.bandwidth == bandwidth


@pytest.mark.parametrize(("memory_gb", "ratio"), [(40, 312 / 1.555), (80, 312 / 1.935)])
def test_a_cluster_file_tells_a_card_by_its_memory(memory_gb: int, ratio: float) -> None:
    a100 = hardware(device="A100", memory_gb=memory_gb, tflops={"bf16": 312, "fp32": 19.5})
    assert a100.get_flops_per_byte("bf16") == pytest.approx(ratio)


@pytest.mark.parametrize(
    "name",
    ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce GTX 1080", "cpu"],
)
def test_another_device_has_no_known_peak(name: str) -> None:
    assert find_device_peak(name) is None
