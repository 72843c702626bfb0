"""Leaving out an update once the gradient's norm is known: just before the update, by DeepSpeed or at ZeRO 0 by us.

DeepSpeed calls the optimizer that it was given, under ZeRO 1 to 3 once for each flat partition. When the optimizer
does nothing, the fp32 weights and the moments stay as they are, and the weights of the forward pass are rounded from
them to the same bits again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class SkippableOptimizer:
    """Stands before an optimizer's updates."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._update = optimizer.step
        self._decide: Callable[[], bool] = _always_update
        self._decided: bool | None = None
        # On the object, not by a subclass: ZeRO accepts optimizers by their exact class.
        optimizer.step = self._step_if_allowed  # type: ignore[method-assign]

    def set_update_condition(self, decide: Callable[[], bool]) -> None:
        """Let `decide` settle the next update, once, when it is due."""
        self._decide, self._decided = decide, None

    def _step_if_allowed(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - the optimizer's own signature
        if self._decided is None:
            self._decided = self._decide()
        return self._update(*arguments, **options) if self._decided else None


def _always_update() -> bool:
    return True
