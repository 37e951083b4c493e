"""Products, prologues and a whole fused layer in float64, against differences."""

import itertools

import pytest
import torch

from llamanb.model import fused as module
from llamanb.model.fused import FusedLayer
from llamanb.model.products import Part, copy_adapters
from tests.unit.small_llama import KINDS, places, tiny


@pytest.fixture
def double(monkeypatch):
    """Plain forms widen to fp32; float64 stays what it is here, so that differences can be taken."""
    wide = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else wide(t))
    model = tiny(1).double()
    return model.get_decoder().layers[0]


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("name", "residual"), [("entry", False), ("gate_up", False), *itertools.product(("o", "down"), (False, True))]
)
def test_products_against_differences(double, name, residual):
    part: Part = getattr(FusedLayer(double), name)
    width = part.linears[0].base.in_features
    inputs = [numbers(4, width) for _ in range(2 if name == "down" else 1)]
    stream = [numbers(4, 32)] if residual else []

    def products(*tensors):
        copy_adapters([part], tensors[0])
        return part(*tensors[: len(inputs)], residual=tensors[len(inputs)] if residual else None)

    # The adapters are the part's own tensors, which gradcheck changes in place
    assert torch.autograd.gradcheck(products, (*inputs, *stream, *part.adapters))


def test_prologues_against_differences(double):
    x, gate, up = numbers(5, 32), numbers(5, 48), numbers(5, 48)
    layer = FusedLayer(double)
    for prologue, inputs in (
        (layer.entry.prologue, (x,)),
        (module.AS_IT_IS, (x,)),
        (module.SWIGLU, (gate, up)),
    ):
        value = prologue.value(*inputs)
        gradient = torch.randn_like(value)
        right = torch.autograd.grad(value, inputs, gradient)
        for one, other in zip(prologue.backward(gradient.clone(), *inputs), right, strict=True):
            torch.testing.assert_close(one, other)
        assert torch.autograd.gradcheck(prologue.value, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_layer_against_differences(double, kind):
    layer, at = FusedLayer(double), places((2, 1))
    adapters = [t for part in layer.parts for t in part.adapters]

    def whole(x, *_):
        copy_adapters(layer.parts, x)
        return layer(x, at, kind)

    assert torch.autograd.gradcheck(whole, (numbers(3, 32), *adapters), fast_mode=True)


def test_rotation_and_last_norm_against_differences(double):
    at = places((3, 2))
    assert torch.autograd.gradcheck(lambda x: module._Rotated.apply(x, at.cos, at.sin), [numbers(5, 16)])
    weight = torch.randn(32, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: module._Normed.apply(x, weight, 1e-5), [numbers(5, 32)])
