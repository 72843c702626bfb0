"""Initial weights of a model from scratch as a pure function of (seed, parameter name).

Every ZeRO stage and number of workers gets the same weights. Raw `zero.Init` leaves the embedding at standard deviation
1, and the draws of transformers' own initialization depend on the order of construction.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

# Gathers a partitioned parameter while it is written; see `engine.gathered_parameter`.
ParameterGatherer = Callable[[nn.Parameter], AbstractContextManager[None]]


_ZERO_CENTERED_NORMS = {"Qwen3NextRMSNorm", "Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm"}  # they scale by 1 + weight


def initialize_weights(model: nn.Module, seed: int, whole: ParameterGatherer) -> None:
    """Write every parameter of `model` in place: matrices normal, norms one, biases zero.

    Norms that multiply by 1 + weight begin at zero. The decay of linear attention begins at log A, A uniform from 0.01
    to 16, its time step at one, as in transformers.
    """
    config: Any = model.config
    std = float(config.initializer_range)
    residual_std = std / math.sqrt(2 * config.num_hidden_layers)
    for module_name, module in model.named_modules():
        for local_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{local_name}"
            # GPT-2 and GPTBigCode scale down the projections into the residual stream (Radford et al. 2019, 2.3).
            scaled = config.model_type == "gpt_bigcode" and name.endswith("c_proj.weight")
            with whole(parameter):
                _init_parameter(parameter.data, module, name, seed, residual_std if scaled else std)


def _init_parameter(data: torch.Tensor, module: nn.Module, name: str, seed: int, std: float) -> None:
    kind = type(module).__name__
    if name.endswith(".A_log"):
        data.copy_(torch.empty(data.shape).uniform_(0.01, 16.0, generator=build_generator(seed, name)).log_())
    elif name.endswith(".dt_bias"):
        data.fill_(1.0)
    elif name.endswith("bias") or kind in _ZERO_CENTERED_NORMS:
        data.zero_()
    elif "norm" in kind.lower():
        data.fill_(1.0)
    else:
        values = torch.empty(data.shape, dtype=torch.float32).normal_(0.0, std, generator=build_generator(seed, name))
        data.copy_(values)


def build_generator(seed: int, name: str) -> torch.Generator:
    """Return the random generator for this name."""
    return torch.Generator().manual_seed(derive_seed(seed, name))


def derive_seed(seed: int, name: str) -> int:
    """Return a seed for this name, the same in every process."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def resize_embeddings(model: nn.Module, rows: int, whole: ParameterGatherer) -> None:
    """Grow embedding and output layer to `rows` rows; new rows are the mean of the old. Tied weights stay tied.

    The mean changes the distribution over the old tokens least. By default transformers draws around it, from a
    generator whose state differs between ranks.
    """
    lm: Any = model
    old_rows = int(lm.config.vocab_size)
    assert rows > old_rows, "the plan refuses to remove rows"
    lm.resize_token_embeddings(rows, mean_resizing=False)
    for matrix in {
        id(layer.weight): layer.weight for layer in (lm.get_input_embeddings(), lm.get_output_embeddings())
    }.values():
        with whole(matrix), torch.no_grad():
            old = matrix.data[:old_rows].cpu()  # a GPU adds in another order, and every machine must get the same rows
            matrix.data[old_rows:] = old.mean(dim=0, dtype=torch.float32).to(matrix)
