"""The bf16 speed that GPUs are sold with, for dense products with sums in fp32: what MFU is a share of."""

from __future__ import annotations

import re

_PEAKS: tuple[tuple[str, float, str], ...] = (
    (r"B200", 2250e12, "DGX B200 data sheet, half of the sparse figure"),
    (r"H[12]00 NVL", 835e12, "H200 NVL and H100 NVL data sheets, half of the sparse figure"),
    (r"H100 PCIe", 756e12, "H100 data sheet (PCIe), half of the sparse figure"),
    (r"G?H[12]00", 989e12, "H100 and H200 data sheets (SXM), half of the sparse figure"),
    (r"A100", 312e12, "A100 data sheet"),
    (r"L40S", 362e12, "L40S data sheet"),
    (r"L40", 181e12, "L40 data sheet"),
    (r"L4", 121e12, "L4 data sheet, half of the sparse figure"),
    (r"A10G", 70e12, "A10G data sheet (Amazon EC2 G5)"),
    (r"A10", 125e12, "A10 data sheet"),
    (r"RTX 4090", 165e12, "Ada architecture white paper, sums in fp32"),
    (r"RTX 3090", 71e12, "GA102 architecture white paper, sums in fp32"),
)


def peak(name: str) -> tuple[float, str] | None:
    """FLOP/s in bf16 of a GPU by the name its driver gives it, and where the number is from; None = not known here.

    A slice of a GPU (MIG) has a part of its speed, and a laptop's GPU shares no more than the name with the card.
    """
    if "MIG" in name or "Laptop" in name:
        return None
    for pattern, flops, source in _PEAKS:
        if re.search(rf"\b(?:{pattern})\b", name):
            return flops, source
    return None
