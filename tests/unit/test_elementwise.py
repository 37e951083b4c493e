"""The plain functions on a GPU without Triton: some tokens at a time, the same results; and how that is noticed."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from llamanb.model import elementwise
from llamanb.model.elementwise import Fast

TOKENS = 2 * elementwise.PLAIN_TOKENS + 7


@pytest.fixture
def a_gpu_without_triton(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(Fast, "why_not", "no Triton here")


def results():
    torch.manual_seed(0)
    x, gradient, up = (torch.randn(TOKENS, 64) for _ in range(3))
    weight, heads = torch.randn(64), x.view(TOKENS, 2, 32)
    return [
        elementwise.rms_norm(x, weight, 1e-5),
        elementwise.rms_norm_backward(gradient.clone(), x, weight, 1e-5),
        elementwise.swiglu(x, up),
        *elementwise.swiglu_backward(gradient.clone(), x, up),
        elementwise.rotate(heads, x[:, :32], up[:, :32], -1),
    ]


def test_a_few_tokens_at_a_time_come_to_the_same(request, monkeypatch):
    whole = results()
    request.getfixturevalue("a_gpu_without_triton")
    sizes, plain = [], F.silu
    monkeypatch.setattr(F, "silu", lambda gate: sizes.append(len(gate)) or plain(gate))
    for one, other in zip(whole, results(), strict=True):
        assert torch.equal(one, other)
    assert sizes == [elementwise.PLAIN_TOKENS] * 2 + [7]


def test_the_loss_takes_a_few_rows_of_logits_at_a_time():
    torch.manual_seed(0)
    logits, labels = torch.randn(150, 50), torch.randint(0, 50, (150,))
    wanted = logits.double().requires_grad_()
    loss = F.cross_entropy(wanted, labels, reduction="sum")
    loss.backward()
    assert elementwise.cross_entropy_(logits, labels).item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(logits.double(), wanted.grad, atol=1e-6)


def test_kernels_that_do_not_run_are_left_with_one_warning(monkeypatch):
    def refuses(*args):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(Fast, "why_not", "")
    monkeypatch.setattr(Fast, "for_", classmethod(lambda cls, x: not cls.why_not))
    monkeypatch.setattr(elementwise, "_kernels", refuses)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    weight = torch.ones(4)
    with pytest.warns(UserWarning, match="do not run here.*RuntimeError: Failed to find C compiler"):
        Fast.try_on(weight)
    assert not Fast.for_(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Fast.try_on(weight)  # once is enough


def test_too_little_memory_is_no_reason_against_kernels(monkeypatch):
    def runs_out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Fast, "why_not", "")
    monkeypatch.setattr(Fast, "for_", classmethod(lambda cls, x: True))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(elementwise, "_kernels", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        Fast.try_on(torch.ones(4))
    assert Fast.why_not == ""


def test_on_a_cpu_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(Fast, "why_not", "")
    Fast.try_on(torch.ones(4))
    assert Fast.why_not == ""
