"""The chunked loss is torch's cross-entropy, in value and in gradients, however it is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_training_toolkit.models import LossModule, build_model
from llm_training_toolkit.models.loss import compute_token_loss_sum

ROWS, WIDTH, VOCABULARY = 23, 16, 37
CHUNKS = [0, 1, 7, 22, 23, 24, 1000]
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def inputs(dtype: torch.dtype = torch.float32, *, rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output weights, labels; every third label is ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (rows,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    assert (grad_hidden.dtype, grad_weight.dtype) == (hidden.dtype, weight.dtype)
    return grad_hidden, grad_weight


@pytest.mark.parametrize("chunk", CHUNKS)
def test_in_fp32_value_and_gradients_are_those_of_torch(chunk: int) -> None:
    hidden, weight, labels = inputs()
    expected = reference(hidden, weight, labels)
    got = compute_token_loss_sum(hidden, weight, labels, chunk)
    assert got.dtype == torch.float32
    assert got.shape == ()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradients(got, hidden, weight), gradients(expected, hidden, weight), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("chunk", CHUNKS)
def test_in_bf16_value_and_gradients_are_those_of_torch_in_fp32_within_rounding(chunk: int) -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    got = compute_token_loss_sum(hidden, weight, labels, chunk)
    exact_hidden, exact_weight = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight))
    expected = reference(exact_hidden, exact_weight, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=0)
    for mine, exact in zip(
        gradients(got, hidden, weight), gradients(expected, exact_hidden, exact_weight), strict=True
    ):
        assert (mine.float() - exact).norm() < 0.02 * exact.norm()


@settings(deadline=None)
@given(rows=st.integers(1, 30), chunk=st.integers(0, 40), seed=st.integers(0, 1000))
def test_the_chunk_changes_nothing_but_rounding(rows: int, chunk: int, seed: int) -> None:
    hidden, weight, labels = inputs(rows=rows, seed=seed)
    whole, cut = (compute_token_loss_sum(hidden, weight, labels, size) for size in (0, chunk))
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(cut, hidden, weight), gradients(whole, hidden, weight), rtol=1e-4, atol=1e-4)


def test_the_value_without_gradients_is_that_with_gradients() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        without = [compute_token_loss_sum(hidden, weight, labels, chunk) for chunk in CHUNKS]
    for chunk, value in zip(CHUNKS, without, strict=True):
        assert not value.requires_grad
        torch.testing.assert_close(
            value, compute_token_loss_sum(hidden, weight, labels, chunk).detach(), rtol=1e-6, atol=0
        )


def test_ignored_rows_have_no_influence_and_zero_gradient() -> None:
    hidden, weight, labels = inputs()
    changed = hidden.detach().clone()
    changed[labels == -100] = float("nan")  # not even a nan there may spread
    changed.requires_grad_()
    loss = compute_token_loss_sum(changed, weight, labels, 5)
    assert torch.equal(loss, compute_token_loss_sum(hidden, weight, labels, 5))
    grad_hidden, grad_weight = gradients(loss, changed, weight)
    assert (grad_hidden[labels == -100] == 0).all()
    assert (grad_hidden[labels != -100] != 0).any(dim=-1).all()
    assert grad_weight.isfinite().all()


@pytest.mark.parametrize("rows", [0, ROWS])
@pytest.mark.parametrize("chunk", [0, 5])
def test_no_label_at_all_gives_zero_still_connected_to_both_inputs(rows: int, chunk: int) -> None:
    hidden, weight, labels = inputs(rows=rows)
    loss = compute_token_loss_sum(hidden, weight, torch.full_like(labels, -100), chunk)
    assert loss.item() == 0
    for gradient, tensor in zip(gradients(loss, hidden, weight), (hidden, weight), strict=True):
        assert gradient.shape == tensor.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_scales_with_what_comes_from_above(dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(dtype)
    plain = gradients(compute_token_loss_sum(hidden, weight, labels, 5), hidden, weight)
    scaled = gradients(compute_token_loss_sum(hidden, weight, labels, 5) / 64, hidden, weight)
    for one, other in zip(plain, scaled, strict=True):
        assert torch.equal(one / 64, other)  # a power of two rounds nothing
    negative = gradients(-3 * compute_token_loss_sum(hidden, weight, labels, 5), hidden, weight)
    torch.testing.assert_close(negative, tuple(-3 * each for each in plain))


@pytest.mark.parametrize("chunk", [0, 5])
def test_a_frozen_output_layer_gets_no_gradient(chunk: int) -> None:
    hidden, weight, labels = inputs()
    loss = compute_token_loss_sum(hidden, weight.detach(), labels, chunk)
    exact = torch.autograd.grad(reference(hidden, weight, labels), hidden)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), exact, rtol=1e-5, atol=1e-5)


def test_a_second_backward_pass_is_refused_as_its_gradients_are_spent() -> None:
    hidden, weight, labels = inputs()
    loss = compute_token_loss_sum(hidden, weight, labels, 5)
    torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    with pytest.raises(AssertionError, match="one backward pass"):
        torch.autograd.grad(loss, (hidden, weight))


def test_at_qwens_vocabulary_chunks_give_the_loss_and_the_gradients_of_whole_logits() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(48, 8, generator=generator).requires_grad_()
    weight = torch.randn(151_936, 8, generator=generator).requires_grad_()
    labels = torch.randint(151_936, (48,), generator=generator)
    expected, got = reference(hidden, weight, labels), compute_token_loss_sum(hidden, weight, labels, 7)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradients(got, hidden, weight), gradients(expected, hidden, weight), rtol=1e-4, atol=1e-4
    )


def test_large_logits_overflow_nothing() -> None:
    hidden, weight, labels = inputs()
    hidden, weight = (200 * hidden.detach()).requires_grad_(), (200 * weight.detach()).requires_grad_()
    loss = compute_token_loss_sum(hidden, weight, labels, 5)
    torch.testing.assert_close(loss, reference(hidden, weight, labels))
    assert all(gradient.isfinite().all() for gradient in gradients(loss, hidden, weight))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Two rows of token ids, positions that restart, and labels with gaps."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(512, (2, 24), generator=generator)
    positions = torch.cat([torch.arange(10), torch.arange(14)]).repeat(2, 1)
    labels = torch.randint(512, (2, 24), generator=generator)
    labels[:, ::4] = -100
    return ids, positions, labels


def module(*, tied: bool, chunk: int = 7) -> LossModule:
    torch.manual_seed(0)
    config: dict[str, Any] = QWEN3 | {"tie_word_embeddings": tied}
    return LossModule(build_model(config, precision="fp32", attention="sdpa"), chunk)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [0, 7])
def test_a_model_s_loss_and_gradients_are_those_of_its_logits(*, tied: bool, chunk: int) -> None:
    model = module(tied=tied, chunk=chunk)
    ids, positions, labels = batch()
    loss = model(ids, positions, labels)
    expected = F.cross_entropy(model.compute_logits(ids, positions).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    parameters = dict(model.named_parameters())
    got, wanted = (torch.autograd.grad(value, list(parameters.values())) for value in (loss, expected))
    for name, mine, exact in zip(parameters, got, wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4, msg=name)


def test_evaluation_gives_the_loss_of_training() -> None:
    model = module(tied=True)
    training = model.train()(*batch())
    with torch.no_grad():
        evaluation = model.eval()(*batch())
    torch.testing.assert_close(evaluation, training.detach(), rtol=1e-6, atol=0)


def test_a_row_of_padding_adds_nothing_and_every_parameter_still_gets_a_gradient() -> None:
    model = module(tied=False)
    ids, positions, labels = batch()
    loss = model(ids, positions, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name
