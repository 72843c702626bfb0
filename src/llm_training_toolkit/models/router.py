"""Routers of a mixture of experts: how evenly they load the experts, and a loss that makes them do so.

The balance loss of a sequence and layer is E x sum over experts of (share of choices) x (mean probability), 1 if even.
It is that of Fedus et al. 2021, section 2.2, by sequence as in DeepSeek-V3, section 2.1.2. A sequence stays whole, so
that the sum over sequences does not depend on micro-batches and workers. Only tokens with a loss count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def find_routers(model: nn.Module) -> list[nn.Module]:
    """Return the routers of a transformers model, layer by layer."""
    return [module for module in model.modules() if hasattr(module, "top_k") and hasattr(module, "num_experts")]


class RouterMonitor:
    """Observes routers in training, by hooks; what it counts stays on the device until `compute_statistics`.

    With activation checkpointing the hooks run again in the backward pass. Then they compute the same, because the
    gradients need it, and count nothing.
    """

    def __init__(self, routers: Sequence[nn.Module], balance: float | None) -> None:
        first: Any = routers[0]
        self._pass = _ObservedPass(int(first.num_experts), int(first.top_k), with_balance=balance is not None)
        self._balance = balance
        self._observers = [_RouterObserver(self._pass) for _ in routers]
        self._balance_sum: Tensor | None = None
        for router, observer in zip(routers, self._observers, strict=True):
            router.register_forward_hook(observer.observe)

    def reset(self, device: torch.device) -> None:
        """Forget what was counted, at the begin of a step."""
        for observer in self._observers:
            observer.choices = torch.zeros(self._pass.experts, device=device)
        self._balance_sum = torch.zeros((), device=device)

    def begin_forward(self, bears_loss: Tensor) -> None:
        """Observe the forward pass of sequences; `bears_loss` (B, T) says of which tokens the loss is taken."""
        self._pass.bears_loss = bears_loss.float()
        if self._balance_sum is None:
            self.reset(bears_loss.device)
        self._pass.is_counting = True

    def stop(self) -> None:
        """Observe no pass until `begin_forward`; a backward pass through the last one must be over."""
        self._pass.bears_loss = None

    def end_forward(self, loss: Tensor) -> Tensor:
        """Return the loss sum of the pass with the balance loss, weighted by the tokens that bear a loss."""
        self._pass.is_counting = False
        terms = [observer.take_term() for observer in self._observers]
        if self._balance is None:
            return loss
        mean = torch.stack([term for term in terms if term is not None]).mean()
        assert self._balance_sum is not None
        self._balance_sum += mean.detach()
        return loss + self._balance * mean

    def get_balance_sum(self) -> Tensor | float:
        """Return the part of the step's loss sums so far that is balance loss."""
        if self._balance is None or self._balance_sum is None:
            return 0.0
        return self._balance * self._balance_sum

    def compute_statistics(self, loss_tokens: int) -> dict[str, float]:
        """Return the metrics of a step with so many loss tokens. Collective; waits for the device once."""
        assert self._balance_sum is not None
        counted = torch.cat([*(observer.choices for observer in self._observers), self._balance_sum[None]])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counted)
        experts = self._pass.experts
        *choices, balance = counted.tolist()
        layers = [choices[start : start + experts] for start in range(0, len(choices), experts)]
        found = {
            "router/max_load": max(max(layer) * experts / max(sum(layer), 1.0) for layer in layers),
            "router/entropy": sum(map(_compute_entropy, layers)) / len(layers),
            "router/dead_experts": float(choices.count(0.0)),
        }
        return found if self._balance is None else found | {"router/balance_loss": balance / max(loss_tokens, 1)}


@dataclass
class _ObservedPass:
    """The forward pass that all routers are observed in."""

    experts: int
    top_k: int
    with_balance: bool
    bears_loss: Tensor | None = None
    is_counting: bool = False


class _RouterObserver:
    """Hook of one router, with what it counts.

    It holds no number of its layer, so that all layers share a graph of torch.compile.
    """

    def __init__(self, observed: _ObservedPass) -> None:
        self._pass = observed
        self.choices = torch.zeros(observed.experts)
        self._term: Tensor | None = None

    def take_term(self) -> Tensor | None:
        """Return the balance loss of the pass, summed over tokens, and forget it."""
        term, self._term = self._term, None
        return term

    def observe(self, router: nn.Module, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
        """Count the choices of the router, and compute its balance loss summed over tokens."""
        observed = self._pass
        bears_loss = observed.bears_loss
        if bears_loss is None or not router.training or not (observed.with_balance or observed.is_counting):
            return
        logits, _, chosen = outputs
        with torch.no_grad():
            choices = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, chosen, 1.0)
            choices = _sum_by_sequence(choices, bears_loss)
            if observed.is_counting:
                self.choices.add_(choices.sum(dim=0))
        if not observed.with_balance:
            return
        probabilities = _sum_by_sequence(logits.softmax(dim=-1, dtype=torch.float32), bears_loss)
        tokens = bears_loss.sum(dim=1).clamp(min=1.0)
        term = ((choices * probabilities).sum(dim=1) * observed.experts / (observed.top_k * tokens)).sum()
        if observed.is_counting:
            self._term = term


def _sum_by_sequence(values: Tensor, bears_loss: Tensor) -> Tensor:
    """Sum values (B x T, E) over the tokens of each sequence that bear a loss."""
    return (values.view(*bears_loss.shape, -1) * bears_loss[..., None]).sum(dim=1)


def _compute_entropy(counts: Sequence[float]) -> float:
    """Return the entropy of a distribution over its largest possible one: 1 if even, 0 if all is in one place."""
    total = max(sum(counts), 1.0)
    shares = [count / total for count in counts if count]
    return -sum(share * math.log(share) for share in shares) / math.log(max(len(counts), 2))
