"""Master weights of ZeRO 0 and 1: gradients summed in fp32, clipped as torch clips, untouched by what is left out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llm_training_toolkit.distributed.tensor_group import get_all_ranks
from llm_training_toolkit.engine import allocation
from llm_training_toolkit.engine.master_weights import MasterWeights
from llm_training_toolkit.engine.sharded_master_weights import ShardedMasterWeights

SHAPES = [(8, 16), (16,), (4, 8)]


def model(dtype: torch.dtype, *, mixed: bool = False) -> list[nn.Parameter]:
    """Parameters of ragged shapes; with `mixed` the second one is in fp32, as norms may be."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    dtypes = [dtype, torch.float32 if mixed else dtype, dtype]
    return [nn.Parameter(value.to(kind)) for value, kind in zip(values, dtypes, strict=True)]


def backward(parameters: list[nn.Parameter], seed: int, scale: float = 1.0) -> list[Tensor]:
    """A pass whose gradients are random numbers; what they are in the parameters' own precision comes back."""
    generator = torch.Generator().manual_seed(seed)
    gradients = [scale * torch.randn(each.shape, generator=generator) for each in parameters]
    gradients = [gradient.to(each.dtype) for gradient, each in zip(gradients, parameters, strict=True)]
    products = [(each * gradient).sum().float() for each, gradient in zip(parameters, gradients, strict=True)]
    torch.autograd.backward(torch.stack(products).sum())
    return gradients


Build = Callable[[list[nn.Parameter]], MasterWeights | ShardedMasterWeights]
CPU = torch.device("cpu")


@pytest.fixture(params=["replica", "sharded", "offload"])
def build(request: pytest.FixtureRequest) -> Build:
    """The classes of ZeRO 0 and of ZeRO 1, the latter also with the fp32 weights in host memory."""
    kinds: dict[str, Build] = {
        "replica": lambda parameters: MasterWeights(parameters, get_all_ranks()),
        "sharded": lambda parameters: ShardedMasterWeights(parameters, CPU, get_all_ranks(), offload=False),
        "offload": lambda parameters: ShardedMasterWeights(parameters, CPU, get_all_ranks(), offload=True),
    }
    return kinds[request.param]


def adamw(master: MasterWeights | ShardedMasterWeights, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW([w for each in parameters for w in master.get_master_weights(each)], lr=1e-2, fused=True)


@pytest.mark.parametrize("mixed", [False, True])
def test_micro_batches_in_bf16_are_summed_in_fp32(build: Build, mixed: bool) -> None:
    parameters = model(torch.bfloat16, mixed=mixed)
    replica = build(parameters)
    made = [backward(parameters, seed) for seed in range(5)]
    replica.reduce_gradients()
    for index, parameter in enumerate(parameters):
        wanted = torch.stack([gradients[index].float() for gradients in made]).sum(0)
        found = replica.get_gradient(parameter)
        assert found is not None
        assert found.dtype == torch.float32
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
    again = backward(parameters, 9)
    replica.reduce_gradients()
    first = replica.get_gradient(parameters[0])
    assert first is not None
    assert torch.equal(first, again[0].float()), "nothing of the step before is left"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("largest", [0.0, 0.5, 1e6])
def test_an_update_is_clipped_as_torch_clips(build: Build, dtype: torch.dtype, largest: float) -> None:
    parameters, plain = model(dtype), [nn.Parameter(each.detach().float()) for each in model(dtype)]
    replica, reference = build(parameters), torch.optim.AdamW(plain, lr=1e-2, fused=True)
    optimizer = adamw(replica, parameters)
    for seed in range(3):
        made = backward(parameters, seed, scale=3.0)
        for each, gradient in zip(plain, made, strict=True):
            each.grad = gradient.float()
        wanted = float(torch.nn.utils.get_total_norm([gradient.float() for gradient in made]))
        if largest:
            torch.nn.utils.clip_grad_norm_(plain, largest)
        reference.step()
        replica.reduce_gradients()
        norm = replica.compute_grad_norm()
        assert norm == pytest.approx(wanted, rel=1e-6)
        replica.clip_gradients(optimizer, norm, largest)
        optimizer.step()
        replica.sync_low_precision()
        for each in parameters:
            each.grad = None
    for parameter, each in zip(parameters, plain, strict=True):
        assert torch.allclose(replica.get_master_weights(parameter)[0], each, rtol=1e-5, atol=1e-6)
        assert torch.equal(parameter, replica.get_master_weights(parameter)[0].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_parameter_without_a_gradient_has_zeros(build: Build, dtype: torch.dtype) -> None:
    parameters = model(dtype)
    replica = build(parameters)
    backward(parameters, 1)
    replica.reduce_gradients()
    for each in parameters:
        each.grad = None
    backward(parameters[:2], 2)
    replica.reduce_gradients()
    last = replica.get_gradient(parameters[2])
    assert last is not None
    assert not last.any()


def test_a_gradient_that_is_not_finite_gives_a_norm_that_is_not(build: Build) -> None:
    parameters = model(torch.bfloat16)
    replica = build(parameters)
    backward(parameters, 1, scale=math.inf)
    replica.reduce_gradients()
    assert not math.isfinite(replica.compute_grad_norm())


def test_without_its_hooks_nothing_is_added(build: Build) -> None:
    parameters = model(torch.bfloat16)
    replica = build(parameters)
    backward(parameters, 1)
    replica.reduce_gradients()
    replica.close()
    after = [replica.get_master_weights(each)[0] for each in parameters]
    before = [each.grad.clone() for each in after if each.grad is not None]
    backward(parameters, 2)
    assert all(torch.equal(each.grad, old) for each, old in zip(after, before, strict=True))  # type: ignore[arg-type]


def test_large_pages_hold_zeros_in_the_given_shapes() -> None:
    flat, pieces = allocation.allocate_zeros(
        [torch.Size([1024, 1024]), torch.Size([3])], torch.float32, torch.device("cpu")
    )
    assert [piece.shape for piece in pieces] == [(1024, 1024), (3,)]
    assert not flat.any()
    pieces[1].fill_(2.0)
    assert flat[-3:].tolist() == [2.0, 2.0, 2.0]
