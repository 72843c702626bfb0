"""Optimizer updates that can be skipped once the gradient norm is known.

The norm is known just before the update, from DeepSpeed or, at ZeRO 0 and 1, from the master weights. DeepSpeed calls
the optimizer it was given, under ZeRO 2 and 3 once per flat partition. A skipped call leaves fp32 weights and moments
unchanged, so that the forward pass's weights are rounded to the same bits again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class SkippableOptimizer:
    """Condition in front of an optimizer's `step`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._update = optimizer.step
        self._decide: Callable[[], bool] | None = None
        self._decided: bool | None = None
        # Patched on the instance, because ZeRO checks the exact class of an optimizer and would reject a subclass.
        optimizer.step = self._step_if_allowed  # type: ignore[method-assign]

    def set_update_condition(self, decide: Callable[[], bool]) -> None:
        """Set the condition of the next update; `decide` is called once, when the update is due."""
        self._decide, self._decided = decide, None

    def _step_if_allowed(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - the optimizer's own signature
        if self._decided is None:
            self._decided = self._decide is None or self._decide()
        return self._update(*arguments, **options) if self._decided else None
