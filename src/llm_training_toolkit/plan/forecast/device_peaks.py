"""Published peak speeds of GPUs, by the name that their driver gives them: the denominator of MFU.

Speeds are of dense products: data sheets with a footnote "with sparsity" print twice as much. bf16 is meant with sums
in fp32, and fp32 without TF32, as torch computes unless it is asked otherwise.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class DevicePeak(NamedTuple):
    """Peak of a GPU in 10^12 operations per second."""

    pattern: str
    """Regular expression of the name; the first one in the table that is found counts.

    If a name may mean several, the one with the lowest bandwidth comes last.
    """
    bandwidth: float
    """Memory bandwidth in 10^12 bytes per second."""
    bf16: float | None
    """None for GPUs without instructions for bf16."""
    fp32: float
    source: str

    def get_flops(self, precision: str) -> float | None:
        """Return the operations per second in `bf16` or `fp32`, or None without such instructions."""
        teraflops = self.bf16 if precision == "bf16" else self.fp32
        return None if teraflops is None else 1e12 * teraflops


_PEAKS = (
    DevicePeak(r"GB200", 8.0, 2500, 80, "NVIDIA GB200 NVL72 data sheet, a 72nd, bf16 half of the sparse figure"),
    DevicePeak(
        r"B200", 8.0, 2250, 75, "NVIDIA DGX and HGX B200 data sheets, an eighth, bf16 half of the sparse figure"
    ),
    DevicePeak(r"H200 NVL", 4.8, 835, 60, "NVIDIA H200 data sheet (NVL), bf16 half of the sparse figure"),
    DevicePeak(r"H100 NVL", 3.9, 835, 60, "NVIDIA H100 NVL data sheet, bf16 half of the sparse figure"),
    DevicePeak(r"H100 PCIe", 2.0, 756, 51, "NVIDIA H100 data sheet (PCIe), bf16 half of the sparse figure"),
    DevicePeak(r"H200", 4.8, 989, 67, "NVIDIA H200 data sheet (SXM), bf16 half of the sparse figure"),
    DevicePeak(r"H100", 3.35, 989, 67, "NVIDIA H100 data sheet (SXM), bf16 half of the sparse figure"),
    DevicePeak(r"GH200 144GB?", 4.9, 989, 67, "NVIDIA GH200 data sheet (HBM3e), bf16 half of the sparse figure"),
    DevicePeak(r"GH200", 4.0, 989, 67, "NVIDIA GH200 data sheet (HBM3), bf16 half of the sparse figure"),
    DevicePeak(r"A100[- ]SXM4?[- ]80GB", 2.039, 312, 19.5, "NVIDIA A100 data sheet (80 GB, SXM)"),
    DevicePeak(r"A100\b.*\b80GB", 1.935, 312, 19.5, "NVIDIA A100 data sheet (80 GB, PCIe)"),
    DevicePeak(r"A100", 1.555, 312, 19.5, "NVIDIA A100 data sheet (40 GB)"),
    DevicePeak(r"L40S", 0.864, 362, 91.6, "NVIDIA L40S data sheet"),
    DevicePeak(r"L40", 0.864, 181, 90.5, "NVIDIA L40 data sheet"),
    DevicePeak(r"L4", 0.3, 121, 30.3, "NVIDIA L4 data sheet, bf16 half of the sparse figure"),
    DevicePeak(r"A10G", 0.6, 70, 31.5, "NVIDIA A10G data sheet (Amazon EC2 G5)"),
    DevicePeak(r"A10", 0.6, 125, 31.2, "NVIDIA A10 data sheet"),
    DevicePeak(r"RTX 4090(?! D\b)", 1.008, 165, 82.6, "NVIDIA Ada architecture white paper, bf16 with sums in fp32"),
    DevicePeak(r"RTX 3090(?! Ti\b)", 0.936, 71, 35.6, "NVIDIA GA102 architecture white paper, bf16 with sums in fp32"),
    DevicePeak(r"V100-(?:SXM|DGXS)\d?", 0.9, None, 15.7, "NVIDIA V100 data sheet (NVLink); it has no bf16"),
    DevicePeak(r"V100-PCIE", 0.9, None, 14, "NVIDIA V100 data sheet (PCIe); it has no bf16"),
    DevicePeak(r"T4", 0.32, None, 8.1, "NVIDIA T4 data sheet; it has no bf16"),
)


def find_device_peak(name: str) -> DevicePeak | None:
    """Return the peak of a GPU by the name of its driver, or None if it is not known here.

    A slice of a GPU (MIG) has a part of its speed, and a laptop's GPU shares no more than the name with the card.
    """
    if "MIG" in name or "Laptop" in name:
        return None
    return next((peak for peak in _PEAKS if re.search(rf"\b(?:{peak.pattern})\b", name)), None)
