"""Layers whose weights come from host memory: bit for bit what resident ones give, whatever the order of visits."""

import bitsandbytes as bnb
import pytest
import torch

from llamanb.model.fused import FusedDecoder
from llamanb.model.head import head_loss
from llamanb.model.homes import HostLayer
from llamanb.model.streamed import StreamedLayers
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED, spread
from tests.unit.small_llama import tiny
from tests.unit.test_fused import gradients, rows_of

DEEP = 7
MIXED = (OFFLOADED, CHECKPOINTED, HALVED, STORED, STORED, CHECKPOINTED, STORED)


def quantized(model):
    """Every frozen linear layer of the decoder in nf4 with quantized constants."""
    for module in model.get_decoder().modules():
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and not child.weight.requires_grad:
                narrow = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4")
                narrow.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, name, narrow.to("cpu"))
    return model


@pytest.fixture(params=[False, True], ids=["16 bits", "nf4"])
def make(request):
    """Two models with the same weights, so that one can be streamed."""
    base = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}

    def make_one():
        model = tiny(DEEP, base=base)
        return quantized(model) if request.param else model

    return make_one


def trained(model, layers, streamed=None, times=3):
    """Loss and gradients of some micro-batches."""
    decoder, found = FusedDecoder(model, layers, "", streamed), []
    for n in range(times):
        ids, labels = rows_of((9, 4 + n))
        with decoder.step():
            hidden = decoder(torch.cat(ids), [len(row) for row in ids])
            loss = head_loss(hidden, model.get_output_embeddings().weight, torch.cat(labels).roll(-1))
            loss.backward()
        found.append((loss.item(), gradients(model)))
    return found


def nowhere_else(streamed):
    """Has a weight that is read without a visit be no number: a CPU could read it where it lies."""
    for host in streamed.hosts.values():
        host.home = host.views(torch.full_like(host.memory, 255))
        host.bind(host.home)
    return streamed


def assert_equal(found, right):
    for (loss, got), (right_loss, wanted) in zip(found, right, strict=True):
        assert loss == right_loss
        assert got.keys() == wanted.keys()
        for name in wanted:
            assert torch.equal(got[name], wanted[name]), name


@pytest.mark.parametrize("layers", [(CHECKPOINTED,) * DEEP, (STORED,) * DEEP, MIXED])
@pytest.mark.parametrize(("numbers", "buffers"), [(range(DEEP), 2), (range(DEEP), 3), ((1, 4, 6), 2), ((2,), 2)])
def test_loss_and_gradients_are_those_of_resident_layers_bit_for_bit(make, layers, numbers, buffers):
    right = trained(make(), layers)
    model = make()
    streamed = nowhere_else(StreamedLayers(model.get_decoder().layers, tuple(numbers), buffers, "cpu"))
    assert_equal(trained(model, layers, streamed), right)


def test_generating_and_scoring_read_the_same_weights(make):
    ids = rows_of((9,))[0][0][None]
    right = make()(input_ids=ids).logits
    model = make()
    streamed = nowhere_else(StreamedLayers(model.get_decoder().layers, range(DEEP), 2, "cpu"))
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, right)
    trained(model, (CHECKPOINTED,) * DEEP, streamed)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, right)


def test_what_the_way_up_ends_with_the_way_down_begins_with(make):
    """Each micro-batch copies every layer twice, but for the two at each turn that are there."""
    model = make()
    streamed = StreamedLayers(model.get_decoder().layers, range(DEEP), 2, "cpu")
    copies, fetch = [], streamed._fetch
    streamed._fetch = lambda number, coming: (copies.append(number), fetch(number, coming))
    trained(model, (CHECKPOINTED,) * DEEP, streamed, times=2)
    assert copies == [0, 1, 2, 3, 4, 5, 6, 4, 3, 2, 1, 0, 2, 3, 4, 5, 6, 4, 3, 2, 1, 0]
    assert streamed.copied == sum(streamed.hosts[n].size for n in copies)


def test_the_next_layer_is_copied_while_one_is_computed(make):
    model = make()
    streamed = StreamedLayers(model.get_decoder().layers, range(DEEP), 3, "cpu")
    for number in range(DEEP):
        streamed.visit(number)
        assert {number, *range(number, min(number + 3, DEEP))} <= {*streamed._held}
    for number in reversed(range(DEEP)):
        streamed.visit(number)
        assert {*range(max(number - 2, 0), number + 1)} <= {*streamed._held}


def test_a_layer_that_has_to_go_reads_host_memory_again(make):
    """On a GPU a product with that would fail, and not be wrong."""
    model = make()
    layers = model.get_decoder().layers
    streamed = StreamedLayers(layers, range(DEEP), 2, "cpu")
    for number in range(4):
        streamed.visit(number)
    reads = [layer.mlp.down_proj.base_layer.weight.untyped_storage().data_ptr() for layer in layers]
    homes = [streamed.hosts[n].memory.untyped_storage().data_ptr() for n in range(DEEP)]
    assert [read == home for read, home in zip(reads, homes, strict=True)] == [True] * 3 + [False] + [True] * 3


def test_a_layers_weights_are_one_piece_that_holds_them_all(make):
    layer = make().get_decoder().layers[0]
    before = {name: p.data.clone() for name, p in layer.named_parameters() if not p.requires_grad}
    host = HostLayer(layer, pinned=False)
    frozen = sum(module.base_layer.weight.nbytes for module in layer.modules() if hasattr(module, "base_layer"))
    assert frozen <= host.size < 1.5 * frozen + 7 * 3 * 256
    for name, p in layer.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p.data, before[name])
    pointers = {p.untyped_storage().data_ptr() for n, p in layer.named_parameters() if "base_layer" in n}
    assert pointers == {host.memory.untyped_storage().data_ptr()}


def test_streamed_layers_are_spread():
    assert spread(0, 8) == ()
    assert spread(8, 8) == tuple(range(8))
    assert spread(2, 8) == (3, 7)
    assert spread(3, 80) == (26, 53, 79)
    for count in range(81):
        assert len(spread(count, 80)) == count


def test_one_buffer_is_refused(make):
    with pytest.raises(ValueError, match="one is read while another"):
        StreamedLayers(make().get_decoder().layers, (0,), 1, "cpu")
