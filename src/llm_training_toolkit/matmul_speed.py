"""Speed of matrix products in bf16 beside fp32 on a device: what `train.precision: auto` decides by."""

from __future__ import annotations

import math
import time

import torch

_SIDE = 256
"""Rows and columns of the products: forward and backward are 0.1 GFLOP, 40 ms at the 2.7 GFLOP/s of bf16 on AVX2."""
_SECONDS = 0.05
"""Time for the measured products, warm-up excluded."""


def bf16_slowdown(device: torch.device) -> float:
    """Seconds of matrix products in bf16 / in fp32, forward and backward, on one thread of this CPU.

    On a GPU, where nothing is measured: 0 if its hardware computes in bf16, else infinite. What torch says of a CPU is
    not the whole truth: AVX2 processors compute in bf16, 5 to 25 times slower than in fp32.
    """
    if device.type != "cpu":
        return 0.0 if torch.cuda.is_bf16_supported(including_emulation=False) else math.inf
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured_slowdown()
    finally:
        torch.set_num_threads(threads)


def _measured_slowdown() -> float:
    """The ratio of the fastest products, in turns, so that a machine that slows down slows both."""
    operands = {dtype: _operands(dtype) for dtype in (torch.float32, torch.bfloat16)}
    for pair in operands.values():
        _product_seconds(*pair)  # the first one prepares oneDNN's kernels
    fastest = dict.fromkeys(operands, math.inf)
    end = time.perf_counter() + _SECONDS
    while True:
        for dtype, pair in operands.items():
            fastest[dtype] = min(fastest[dtype], _product_seconds(*pair))
        if time.perf_counter() > end:
            return fastest[torch.bfloat16] / fastest[torch.float32]


def _operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)  # the process's own generator is left as it is
    one, other = (torch.randn(_SIDE, _SIDE, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return one, other


def _product_seconds(one: torch.Tensor, other: torch.Tensor) -> float:
    began = time.perf_counter()
    product = one @ other
    torch.autograd.backward(product, product.detach())
    seconds = time.perf_counter() - began
    one.grad = other.grad = None
    return seconds
