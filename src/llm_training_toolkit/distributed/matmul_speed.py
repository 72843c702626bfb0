"""Speed of matrix products in bf16 relative to fp32 on a device, for `train.precision: auto`."""

from __future__ import annotations

import math
import time

import torch

_SMALL, _LARGE = 64, 256  # rows and columns; forward and backward at 256 are 0.1 GFLOP, 40 ms at AVX2's 2.7 GFLOP/s
_SECONDS = 0.05  # for the products of one size, warm-up excluded
_MAX_PRODUCT_SECONDS = 0.5  # for one large product in bf16, foreseen from a small one: bounds the measurement


def measure_bf16_slowdown(device: torch.device) -> float:
    """Return seconds in bf16 / seconds in fp32 of matrix products, forward and backward, on one thread of this CPU.

    On a GPU nothing is measured: 0 if its hardware computes in bf16, else infinite. On a CPU torch's own answer is not
    enough, because AVX2 processors compute in bf16, but 5 to 25 times slower than in fp32.
    """
    if device.type != "cpu":
        return 0.0 if torch.cuda.is_bf16_supported(including_emulation=False) else math.inf
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure_cpu_slowdown()
    finally:
        torch.set_num_threads(threads)


def _measure_cpu_slowdown() -> float:
    """Return the ratio for large products, or for small ones if a large one would take too long."""
    fp32, bf16 = _time_fastest_matmuls(_SMALL)
    if bf16 * (_LARGE / _SMALL) ** 3 < _MAX_PRODUCT_SECONDS:
        fp32, bf16 = _time_fastest_matmuls(_LARGE)
    return bf16 / fp32


def _time_fastest_matmuls(side: int) -> tuple[float, float]:
    """Return the least seconds in fp32 and in bf16, measured in turns, so that throttling affects both."""
    dtypes = (torch.float32, torch.bfloat16)
    operands = {dtype: _build_operands(side, dtype) for dtype in dtypes}
    for pair in operands.values():
        _time_matmul(*pair)  # warm-up: the first one prepares oneDNN's kernels
    fastest = dict.fromkeys(dtypes, math.inf)
    end = time.perf_counter() + _SECONDS
    while True:
        for dtype, pair in operands.items():
            fastest[dtype] = min(fastest[dtype], _time_matmul(*pair))
        if time.perf_counter() > end:
            return fastest[torch.float32], fastest[torch.bfloat16]


def _build_operands(side: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)  # leaves the global generator unchanged
    one, other = (torch.randn(side, side, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return one, other


def _time_matmul(one: torch.Tensor, other: torch.Tensor) -> float:
    start = time.perf_counter()
    product = one @ other
    torch.autograd.backward(product, product.detach())
    seconds = time.perf_counter() - start
    one.grad = other.grad = None
    return seconds
