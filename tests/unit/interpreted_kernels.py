"""Every Triton kernel against its plain form, in Triton's interpreter, which runs on a CPU.

The interpreter must be asked for before Triton is imported, so tests/unit/test_kernels.py runs this file in a process
of its own. By hand: `TRITON_INTERPRET=1 python -m pytest tests/unit/interpreted_kernels.py`.
"""

import os

import bitsandbytes.functional as bnb
import pytest
import torch

from llamanb.model import elementwise, kernels
from llamanb.model.elementwise import Fast
from llamanb.tape import CHECKPOINTED, HALVED, STORED
from tests.unit.test_fused import UNEVEN, found, rows_of, tiny

assert os.environ.get("TRITON_INTERPRET") == "1", "kernels would be compiled, for a GPU"

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NEAR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Of the largest number: the arithmetic is fp32, and what is rounded on the way differs by a place or two."""


def cut(x: torch.Tensor) -> torch.Tensor:
    """To bf16 as the interpreter does it; a GPU rounds."""
    return (x.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_near(got, right, dtype):
    assert got.dtype == right.dtype
    atol = NEAR[dtype] * max(1.0, right.float().abs().max().item())
    torch.testing.assert_close(got.float(), right.float(), rtol=0, atol=atol)


SHAPES = [(1, 64), (24, 8), (64, 96), (40, 88), (127, 128), (260, 64), (520, 128)]
"""Of weights: fewer constants than one program takes, or scales of constants that are not all full."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_bitsandbytes_bit_for_bit(shape, kind, nested, dtype):
    packed, state = bnb.quantize_4bit(numbers(*shape, dtype=dtype), quant_type=kind, compress_statistics=nested)
    got = kernels.dequantize(packed, state)
    state.shape = (1, got.numel())  # on a CPU bitsandbytes wants each row to begin with a constant of its own
    if dtype == torch.bfloat16:
        state.dtype = torch.float32
    right = bnb.dequantize_4bit(packed, state).view(shape)
    assert got.dtype == dtype
    assert torch.equal(got, cut(right) if dtype == torch.bfloat16 else right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 64), (2, 100), (3, 3072)])
def test_rms_norm(rows, width, dtype):
    x, weight = numbers(rows, width, dtype=dtype), numbers(width, dtype=dtype)
    assert_near(kernels.rms_norm(x, weight, 1e-5), elementwise.rms_norm(x, weight, 1e-5), dtype)
    gradient = numbers(width, rows, dtype=dtype).reshape(rows, width)
    right = elementwise.rms_norm_backward(gradient.clone(), x, weight, 1e-5)
    assert_near(kernels.rms_norm_backward(gradient, x, weight, 1e-5), right, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 2047), (2, 1024), (3, 683), (7, 700)])
def test_swiglu(shape, dtype):
    gate, up, gradient = numbers(*shape, dtype=dtype) * 4, numbers(*shape, 1, dtype=dtype)[..., 0], numbers(*shape)
    assert_near(kernels.swiglu(gate, up), elementwise.swiglu(gate, up), dtype)
    gradient = gradient.to(dtype)
    right = elementwise.swiglu_backward(gradient.clone(), gate, up)
    for got, expected in zip(kernels.swiglu_backward(gradient, gate, up), right, strict=True):
        assert_near(got, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 6), (8, 64), (24, 128)])
def test_rotate(heads, size, sign, dtype):
    """Heads that are no power of two (3B has 24), and numbers that lie apart as in one product of q, k and v."""
    x, cos, sin = numbers(5, heads, size, dtype=dtype), numbers(5, size, dtype=dtype), numbers(size, 5, dtype=dtype)
    cos, sin = (torch.cat([t[:, : size // 2]] * 2, 1).contiguous() for t in (cos, sin.t()))
    right = elementwise.rotate(x, cos, sin, sign)
    apart = torch.full((5, 2 * heads + 1, size + 3), 7.0, dtype=dtype)[:, 1::2, :size]
    apart.copy_(x)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for one in (x, apart, turned):
        got = kernels.rotate(one, cos, sin, sign)
        assert got.is_contiguous()
        assert_near(got, right, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [2, 97, 4096, 4097, 9000])
def test_cross_entropy(columns, dtype):
    logits = 5 * numbers(4, columns, dtype=dtype)
    labels = torch.tensor([0, columns - 1, columns // 2, 1])
    right = logits.clone()
    loss = elementwise.cross_entropy_(right, labels)
    got = kernels.cross_entropy_(logits, labels)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_near(logits, right, dtype)


def test_cross_entropy_of_large_logits_is_finite():
    logits = torch.tensor([[60000.0, -60000.0, 0.0]] * 2).half()
    loss = kernels.cross_entropy_(logits, torch.tensor([0, 2]))
    assert loss.item() == 60000
    assert logits.tolist() == [[0, 0, 0], [1, 0, -1]]


def test_cross_entropy_of_no_row_is_zero():
    assert kernels.cross_entropy_(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)).item() == 0


@pytest.fixture
def fast(monkeypatch):
    """All of elementwise's functions go through the kernels."""
    used = []
    through = elementwise._kernels
    monkeypatch.setattr(Fast, "for_", lambda x: True)
    monkeypatch.setattr(Fast, "try_on", lambda weight: None)
    monkeypatch.setattr(elementwise, "_kernels", lambda: used.append(1) or through())
    return used


@pytest.mark.parametrize("layers", [(STORED, HALVED), (CHECKPOINTED, STORED)])
def test_fused_layers_are_the_same_through_the_kernels(layers, request):
    """No function overwrites what another still needs."""
    model = tiny(2)
    ids, labels = rows_of(UNEVEN)
    loss, right = found(model, ids, labels, layers)
    used = request.getfixturevalue("fast")
    fast_loss, got = found(model, ids, labels, layers)
    assert len(used) > 20
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    for name in right:
        largest = right[name].abs().max().item()
        torch.testing.assert_close(got[name], right[name], rtol=0, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize(
    ("shape", "block", "usual"), [((64, 8), 64, True), ((64, 8), 128, False), ((6, 10), 64, False)]
)
def test_weights_that_are_not_packed_as_usual_go_through_bitsandbytes(fast, shape, block, usual):
    packed, state = bnb.quantize_4bit(numbers(*shape), blocksize=block, quant_type="nf4")
    weight = torch.nn.Parameter(packed, requires_grad=False)
    weight.quant_state = state
    assert torch.equal(elementwise.dequantize(weight), bnb.dequantize_4bit(packed, state))
    assert bool(fast) == usual
