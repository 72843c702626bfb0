"""How long work takes on a device, without making the host wait for it."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import torch


class Stopwatch:
    """Adds up what is done within `with`; `seconds` may be asked once the device has done all of it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._began = self._total = 0.0

    def __enter__(self) -> Self:
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._spans.append((begin, end))
            self._spans[-1][0].record()
        else:
            self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_gpu:
            self._spans[-1][1].record()
        else:
            self._total += time.perf_counter() - self._began

    def seconds(self) -> float:
        """The sum so far."""
        milliseconds = sum(float(begin.elapsed_time(end)) for begin, end in self._spans)
        return self._total + milliseconds / 1e3
