"""A kind of attention against the eager one in fp32, on rows of packed documents: the same numbers, and no leak.

The reference computes in fp32 with the very weights that the others have in bf16. A bf16 kernel is judged by
the error that eager attention makes in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_training_toolkit.config import Config, parse_config
from llm_training_toolkit.engine import gathered_parameter
from llm_training_toolkit.models import LossModule, build_model, initialize_weights
from llm_training_toolkit.plan import make_plan
from smoke.task import Values, run

_LENGTHS = (130, 201, 1, 180)
"""Tokens of the documents of a row: odd numbers on purpose."""
_SPANS = [slice(sum(_LENGTHS[:i]), sum(_LENGTHS[: i + 1])) for i in range(len(_LENGTHS))]
_CHANGED, _ALONE = 0, 1
"""The document that is replaced to look for leaks, and the one that is also computed without the others."""


def attention(arguments: Values) -> Values:
    """What `compare` finds for one kind of attention, by precision."""
    config, device = parse_config(arguments["config"], "gpu smoke"), torch.device(arguments["device"])
    kind = arguments["attention"]
    return {precision: compare(config, kind, precision, device) for precision in arguments["precisions"]}


def compare(config: Config, kind: str, precision: str, device: torch.device) -> Values:
    """Errors as relative root mean squares, and the largest change that one document makes in the others."""
    ids, positions = (tensor.to(device) for tensor in rows(2))
    model = _model(config, kind, precision, device)
    plain = _model(config, "eager", precision, device)
    reference = _model(config, "eager", "fp32", device)
    reference.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})

    wanted, wanted_gradient = _compute(reference, ids, positions)
    logits, gradient = _compute(model, ids, positions)
    eager, eager_gradient = _compute(plain, ids, positions)
    alone, _ = _compute(model, ids[:, _SPANS[_ALONE]], positions[:, _SPANS[_ALONE]])
    other = ids.clone()
    other[0, _SPANS[_CHANGED]] = (other[0, _SPANS[_CHANGED]] + 7) % 256
    changed, _ = _compute(model, other, positions)
    moved = (changed - logits).abs()
    return {
        "error": _error(logits, wanted),
        "eager_error": _error(eager, wanted),
        "gradient_error": _error(gradient, wanted_gradient),
        "eager_gradient_error": _error(eager_gradient, wanted_gradient),
        "alone_error": _error(alone, wanted[:, _SPANS[_ALONE]]),
        "leak": float(moved[0, _SPANS[_CHANGED].stop :].max()),
        "change": float(moved[0, _SPANS[_CHANGED]].max()),
        "scale": float(wanted.abs().max()),
    }


def rows(count: int) -> tuple[Tensor, Tensor]:
    """`count` different rows of packed documents: token ids and positions, each (count, T)."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (count, sum(_LENGTHS)), generator=generator)
    return ids, torch.cat([torch.arange(length) for length in _LENGTHS]).repeat(count, 1)


def _model(config: Config, kind: str, precision: str, device: torch.device) -> LossModule:
    """The same weights every time; wider than usual, so that attention looks at some tokens more than at others."""
    hf_config = dict(make_plan(config).hf_config) | {"initializer_range": 0.05}
    model = build_model(hf_config, precision=precision, attention=kind)
    initialize_weights(model, config.run.seed, gathered_parameter)
    return LossModule(model, config.model.loss_chunk_size).to(device)


def _compute(model: LossModule, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V), and the gradient of their loss in the embedding (V, H), both fp32."""
    model.train()
    model.zero_grad()
    model(ids, positions, ids.roll(-1, 1)).backward()
    embedding: Any = model.lm.get_input_embeddings()  # type: ignore[operator]
    gradient: Tensor = embedding.weight.grad
    with torch.no_grad():
        logits = model.compute_logits(ids, positions)
    return logits.float(), gradient.float()


def _error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, relative to that of what is wanted."""
    return float((found - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt())


if __name__ == "__main__":
    run(attention)
