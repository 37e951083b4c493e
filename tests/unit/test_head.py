"""The loss by tiles, held to PyTorch's own cross entropy of whole logits."""

import pytest
import torch
from torch.nn import functional as F

from llamanb.data.encode import IGNORE
from llamanb.model import head
from llamanb.model.elementwise import cross_entropy_
from llamanb.model.head import head_loss
from llamanb.tape import HEAD_TILE

WIDTH, VOCABULARY = 12, 50


@pytest.fixture
def double(monkeypatch):
    """Plain forms widen to fp32; float64 stays what it is here, and so does the loss."""
    wide, zeros = torch.Tensor.float, torch.zeros
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else wide(t))
    monkeypatch.setattr(torch, "zeros", lambda *args, **settings: zeros(*args, **{"dtype": torch.float64, **settings}))


def given(tokens, dtype=torch.float32, ignored=0.4):
    source = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, WIDTH, generator=source, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=source, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY, (tokens,), generator=source)
    labels[torch.rand(tokens, generator=source) < ignored] = IGNORE
    return hidden, weight, labels


def whole(hidden, weight, labels):
    """Loss and gradient in float64, from all logits at once."""
    hidden = hidden.detach().double().requires_grad_()
    loss = F.cross_entropy(hidden @ weight.double().t(), labels, ignore_index=IGNORE, reduction="sum")
    loss.backward()
    return loss.detach(), hidden.grad


@pytest.mark.parametrize("ignored", [0.0, 0.4, 0.95])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_value_and_gradient_are_those_of_whole_logits(tokens, ignored):
    hidden, weight, labels = given(tokens, ignored=ignored)
    labels[-1] = 3
    right, gradient = whole(hidden, weight, labels)
    loss = head_loss(hidden, weight, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(right.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, gradient.float(), rtol=0, atol=2e-6)
    assert (hidden.grad[labels == IGNORE] == 0).all()


def test_value_and_gradient_in_float64(double):
    hidden, weight, labels = given(9, torch.float64)
    right, gradient = whole(hidden, weight, labels)
    loss = head_loss(hidden, weight, labels)
    loss.backward()
    torch.testing.assert_close(loss.detach(), right)
    torch.testing.assert_close(hidden.grad, gradient)
    assert torch.autograd.gradcheck(lambda x: head_loss(x, weight, labels), [hidden])


def test_what_comes_from_above_scales_the_gradient():
    hidden, weight, labels = given(20)
    _, gradient = whole(hidden, weight, labels)
    (head_loss(hidden, weight, labels) * -2.5).backward()
    torch.testing.assert_close(hidden.grad, (-2.5 * gradient).float(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("tokens", [0, 5])
def test_without_a_trained_token_the_loss_is_a_zero_that_is_connected(tokens):
    hidden, weight, labels = given(tokens)
    loss = head_loss(hidden, weight, torch.full_like(labels, IGNORE))
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad.shape == hidden.shape
    assert not hidden.grad.any()


@pytest.mark.parametrize("trained", [3, 4, 5, 8, 9])
def test_tiles_borders_are_seen_nowhere(monkeypatch, trained):
    hidden, weight, labels = given(11)
    labels[:trained], labels[trained:] = 1, IGNORE
    right, gradient = whole(hidden, weight, labels)
    monkeypatch.setattr(head, "HEAD_TILE", 4)
    loss = head_loss(hidden, weight, labels)
    loss.backward()
    assert loss.item() == pytest.approx(right.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, gradient.float(), rtol=0, atol=2e-6)


def test_no_more_than_a_tile_of_logits_exists(monkeypatch):
    rows = []

    def watched(logits, labels):
        rows.append(len(logits))
        return cross_entropy_(logits, labels)

    monkeypatch.setattr(head, "cross_entropy_", watched)
    hidden, weight, labels = given(2 * HEAD_TILE + 3, ignored=0)
    head_loss(hidden, weight, labels)
    assert rows == [HEAD_TILE, HEAD_TILE, 3]


def test_of_the_logits_nothing_is_kept():
    hidden, weight, labels = given(30)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        head_loss(hidden, weight, labels)
    trained = int((labels != IGNORE).sum())
    assert sorted(tuple(t.shape) for t in kept) == [(trained,), (trained, WIDTH)]


def test_the_head_gets_no_gradient():
    hidden, weight, labels = given(6)
    weight.requires_grad_()
    head_loss(hidden, weight, labels).backward()
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_near_32(dtype):
    hidden, weight, labels = given(200, dtype)
    right, gradient = whole(hidden, weight, labels)
    loss = head_loss(hidden, weight, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == dtype
    assert loss.item() == pytest.approx(right.item(), rel=1e-2)
    assert F.cosine_similarity(hidden.grad.double().flatten(), gradient.flatten(), dim=0) > 0.999


def test_a_scale_beyond_fp16_overflows_nothing_that_is_finite():
    """GradScaler begins at 65,536, which fp16 does not have."""
    hidden, weight, labels = given(100, torch.float16)
    weight *= 0.05
    _, gradient = whole(hidden, weight, labels)
    scale = torch.tensor(2.0**17)
    (head_loss(hidden, weight, labels) * scale).backward()
    expected = gradient * scale.item()
    assert 1000 < expected.abs().max() < 65504 < scale
    assert torch.isfinite(hidden.grad).all()
    torch.testing.assert_close(hidden.grad.double(), expected, rtol=0.05, atol=0.01 * expected.abs().max().item())


def test_wide_logits_neither_overflow_nor_vanish():
    hidden, weight, labels = given(5, ignored=0)
    with torch.no_grad():
        hidden *= 100
    right, gradient = whole(hidden, weight, labels)
    loss = head_loss(hidden, weight, labels)
    loss.backward()
    assert loss.item() == pytest.approx(right.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad, gradient.float(), rtol=1e-4, atol=1e-5)
