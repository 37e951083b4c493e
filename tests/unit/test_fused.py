"""Fused layers held to transformers' and peft's: loss and every adapter's gradient, whatever of a layer is kept; and
what is kept."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F

from llamanb import Card, Recipe, plan
from llamanb.architecture import Architecture
from llamanb.data.encode import IGNORE, load_tokenizer
from llamanb.memory import outline
from llamanb.model import attach_adapters, load_model, products
from llamanb.model import fused as module
from llamanb.model.fused import FusedDecoder, FusedLayer, fits_layer
from llamanb.model.head import head_loss
from llamanb.model.products import Part, copy_adapters
from llamanb.recipe import LINEAR_LAYERS
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED, Workload
from llamanb.tape.step import Step
from tests.unit.small_llama import KINDS, RANK, VOCABULARY, places, tiny

MIXED = (OFFLOADED, CHECKPOINTED, HALVED, STORED)
LAYOUTS = [*((kind,) * 4 for kind in KINDS), MIXED, MIXED[::-1], (HALVED, STORED, CHECKPOINTED, STORED)]
EVEN, UNEVEN, ALONE = (7, 7, 7), (9, 1, 6, 4), (11,)


@pytest.fixture(scope="module")
def shared():
    return tiny()


def rows_of(lengths, vocabulary=VOCABULARY):
    """Token ids of each row, and labels of which some are not trained."""
    source = torch.Generator().manual_seed(1)
    ids = [torch.randint(vocabulary, (n,), generator=source) for n in lengths]
    labels = [torch.where(torch.rand(len(row), generator=source) < 0.3, IGNORE, row) for row in ids]
    return ids, [torch.cat([torch.tensor([IGNORE]), row[1:]]) for row in labels]


def gradients(model) -> dict[str, torch.Tensor]:
    """And forgets them."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def expected(model, ids, labels):
    """Summed loss and gradients, as transformers and peft have them, each row by itself."""
    total = 0
    for row, right in zip(ids, labels, strict=True):
        logits = model(input_ids=row[None]).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, right[1:], ignore_index=IGNORE, reduction="sum")
    total.backward()
    return total.item(), gradients(model)


def found(model, ids, labels, layers=()):
    decoder = FusedDecoder(model, layers, "")
    with decoder.step():
        hidden = decoder(torch.cat(ids), [len(row) for row in ids])
        loss = head_loss(hidden, model.get_output_embeddings().weight, torch.cat(labels).roll(-1))
        loss.backward()
    return loss.item(), gradients(model)


def assert_same(model, lengths, layers, vocabulary=VOCABULARY, tolerance=1e-5):
    ids, labels = rows_of(lengths, vocabulary)
    loss, right = expected(model, ids, labels)
    fused_loss, got = found(model, ids, labels, layers)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert got.keys() == right.keys()
    for name in right:
        assert got[name].dtype == torch.float32
        largest = right[name].abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(got[name], right[name], rtol=0, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize("lengths", [EVEN, UNEVEN, ALONE])
@pytest.mark.parametrize("layers", LAYOUTS, ids="-".join)
def test_loss_and_gradients_are_those_of_transformers_and_peft(shared, layers, lengths):
    assert_same(shared, lengths, layers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "targets",
    [LINEAR_LAYERS[:4], LINEAR_LAYERS[4:], ("q_proj", "v_proj"), ("k_proj", "up_proj"), *([n] for n in LINEAR_LAYERS)],
    ids="-".join,
)
def test_adapters_on_some_of_the_linear_layers(targets, kind):
    assert_same(tiny(2, list(targets)), UNEVEN, (kind,) * 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_adapters_in_some_of_the_layers(layers, kind):
    assert_same(tiny(3, list(LINEAR_LAYERS), layers_to_transform=layers), UNEVEN, (kind,) * 3)


def test_scaling_ranks_and_biasless_variants_of_peft():
    pattern = {"rank_pattern": {"q_proj": 5, "up_proj": 1}, "alpha_pattern": {"v_proj": 11}, "use_rslora": True}
    assert_same(tiny(2, **pattern), UNEVEN, (STORED, CHECKPOINTED))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_every_number_of_key_heads(kv_heads):
    model = tiny(2, base={"num_key_value_heads": kv_heads, "tie_word_embeddings": True})
    assert_same(model, UNEVEN, (STORED, CHECKPOINTED))


QUANTIZED = [("qlora-nf4", True), ("qlora-nf4", False), ("qlora-fp4", True)]


@pytest.mark.parametrize(("method", "double"), QUANTIZED)
def test_4_bit_weights(mini, method, double):
    recipe = Recipe(model=str(mini), method=method, double_quant=double, rank=4)
    model = attach_adapters(load_model(plan(recipe, Card("CPU", None)), load_tokenizer(mini)), recipe)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    assert model.get_decoder().layers[0].mlp.up_proj.weight.quant_state.nested == double
    for kind in KINDS:
        assert_same(model, UNEVEN, (kind,) * 2, vocabulary=500)


def test_16_bit_layers_give_fp32_gradients_near_those_of_32_bits():
    model = tiny(2)
    narrow = copy.deepcopy(model)
    for weight in narrow.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()
    ids, labels = rows_of(UNEVEN)
    _, right = expected(model, ids, labels)
    for kind in KINDS:
        _, got = found(narrow, ids, labels, (kind,) * 2)
        for name in right:
            assert got[name].dtype == torch.float32
            assert F.cosine_similarity(got[name].flatten(), right[name].flatten(), dim=0) > 0.999, name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_see_each_other(shared, kind):
    ids, _ = rows_of(UNEVEN)
    decoder = FusedDecoder(shared, (kind,) * 4, "")
    head = shared.get_output_embeddings().weight
    with decoder.step():
        together = decoder(torch.cat(ids), UNEVEN).split(UNEVEN)
        apart = [decoder(row, [len(row)]) for row in ids]
    for row, hidden, alone in zip(ids, together, apart, strict=True):
        torch.testing.assert_close(hidden, alone, rtol=0, atol=1e-5)
        logits = shared(input_ids=row[None]).logits[0]
        torch.testing.assert_close(hidden @ head.t(), logits, rtol=0, atol=1e-5)


def test_positions_begin_anew_with_each_row(shared, monkeypatch):
    """Attention sees differences alone, but angles far from zero lose digits, and are not what was pretrained."""
    ids, _ = rows_of(UNEVEN)
    positions, rotary = [], shared.get_decoder().rotary_emb
    monkeypatch.setattr(rotary, "forward", lambda x, at, forward=rotary.forward: positions.append(at) or forward(x, at))
    decoder = FusedDecoder(shared, (), "")
    with decoder.step():
        decoder(torch.cat(ids), UNEVEN)
    assert [at.tolist() for at in positions] == [[[i for n in UNEVEN for i in range(n)]]]


def test_no_layers_named_means_all_are_kept(shared):
    ids, labels = rows_of(EVEN)
    named, unnamed = found(shared, ids, labels, (STORED,) * 4), found(shared, ids, labels)
    assert named[0] == unnamed[0]
    assert all(torch.equal(named[1][name], unnamed[1][name]) for name in named[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_adds_the_same_or_refuses(kind):
    model = tiny(2)
    ids, labels = rows_of(UNEVEN)

    decoder = FusedDecoder(model, (kind,) * 2, "")
    copy_adapters(decoder.parts, model.get_decoder().norm.weight)

    def loss():
        hidden = decoder(torch.cat(ids), UNEVEN)
        return head_loss(hidden, model.get_output_embeddings().weight, torch.cat(labels).roll(-1))

    made = loss()
    made.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    made.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * once[name], msg=name)
    with pytest.raises(RuntimeError, match="second time"):
        made.backward()
    first = next(p for p in model.parameters() if p.requires_grad)
    [of_first] = torch.autograd.grad(loss(), [first], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        of_first.sum().backward()


# What is kept

LOW = {"entry": 3 * RANK, "o": RANK, "gate_up": 2 * RANK, "down": RANK}
HALF = {"input": 32, "queries": 32, "keys": 16, "values": 16, "attended": 32, "normalizer": 4, "stream": 32}
ATTENTION = sum(HALF.values()) + LOW["entry"] + LOW["o"]
KEPT = {STORED: ATTENTION + 2 * 48 + LOW["gate_up"] + LOW["down"], HALVED: ATTENTION, CHECKPOINTED: 32, OFFLOADED: 0}
"""Numbers of each token that a layer keeps, as the module says: of the tensors above, and of `low`, the adapters' low
rank."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_keeps_what_the_module_says_and_the_tape_plans(shared, kind):
    layer, at, tokens = FusedLayer(shared.get_decoder().layers[0]), places((4, 4), torch.float32), 8
    kept = {}
    copy_adapters(layer.parts, at.cos)

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(tokens, 32, requires_grad=True), at, kind)
    for given in (at.cos, at.sin):
        kept.pop(given.untyped_storage().data_ptr(), None)
    assert sum(storage.nbytes() for storage in kept.values()) == 4 * tokens * KEPT[kind]
    assert planned_bytes(kind, tokens) == 4 * tokens * KEPT[kind]


def planned_bytes(kind, tokens):
    """What a fused layer keeps on the tape, its input with it."""
    model = Architecture("tiny", 32, 1, 4, 2, 8, 48, VOCABULARY, False, 64)
    writer = Step(Workload(model, 1, tokens, (kind,), True, "fp32", None, rank=RANK, kernel="flash"))
    x = writer.new(4 * tokens * 32)
    out, _ = writer.fused_layer(x, kind)
    writer.free(out, x if kind == OFFLOADED else None)
    alive = {slot - 1 for slot in writer.tape.events if slot > 0} - {-slot - 1 for slot in writer.tape.events}
    return sum(writer.tape.sizes[slot] for slot in alive)


def test_offloaded_inputs_wait_in_host_memory(shared, monkeypatch):
    waiting, save_on_cpu = [], torch.autograd.graph.save_on_cpu

    def watched(pin_memory):
        waiting.append(pin_memory)
        return save_on_cpu(pin_memory=pin_memory)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", watched)
    ids, labels = rows_of(EVEN)
    found(shared, ids, labels, (OFFLOADED, STORED, CHECKPOINTED, OFFLOADED))
    assert waiting == [False, False], "pinned where there is a GPU"


def test_a_frozen_input_gets_no_gradient_and_no_product_is_made_for_it(monkeypatch):
    model, made = tiny(2), []
    product = products._product_backward
    monkeypatch.setattr(products, "_product_backward", lambda *args: made.append(1) or product(*args))
    ids, labels = rows_of(EVEN)
    found(model, ids, labels)
    assert len(made) == 7 + 4, "of the first layer, queries, keys and values end at the embedding"


# What cannot be fused


@pytest.mark.parametrize(
    ("settings", "base", "why"),
    [
        ({}, {}, ""),
        ({"use_rslora": True}, {}, ""),
        ({"lora_dropout": 0.1}, {}, "adapters with dropout"),
        ({"use_dora": True}, {}, "DoRA"),
        ({"targets": ["q_proj"], "lora_bias": True}, {"attention_bias": True}, "adapters with biases"),
        ({}, {"attention_bias": True}, "linear layers with biases"),
        ({"targets": ["q_proj"]}, {"mlp_bias": True}, "linear layers with biases"),
        ({}, {"attention_dropout": 0.1}, "attention with dropout"),
        ({}, {"hidden_act": "gelu"}, "gelu in the MLP"),
    ],
)
def test_layers_that_cannot_be_fused_are_told_with_why(settings, base, why):
    layers = tiny(2, base=base, **settings).get_decoder().layers
    assert [fits_layer(layer) for layer in layers] == [why] * 2


def _two_adapters(model):
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], r=2))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: model.merge_adapter(), "more than one adapter, or none in use"),
        (lambda model: model.base_model.disable_adapter_layers(), "more than one adapter, or none in use"),
        (_two_adapters, "more than one adapter, or none in use"),
        (lambda model: model.requires_grad_(True), "weights that are trained themselves"),
    ],
)
def test_adapters_that_are_not_plainly_in_use_are_told(change, why):
    model = tiny(1)
    change(model)
    assert fits_layer(model.get_decoder().layers[0]) == why


def test_int8_is_told(mini):
    recipe = Recipe(model=str(mini), method="qlora-int8")
    model = load_model(plan(recipe, Card("CPU", None)), load_tokenizer(mini))
    assert fits_layer(attach_adapters(model, recipe).get_decoder().layers[0]) == "int8"


def test_adapters_are_copied_once_for_all_of_a_steps_products(shared, monkeypatch):
    ids, labels = rows_of(UNEVEN)
    decoder, copied = FusedDecoder(shared, (STORED, HALVED, CHECKPOINTED, OFFLOADED), ""), []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *args: copied.append(args) or copy(*args))
    first = next(p for p in shared.parameters() if p.requires_grad)
    before = first.detach().clone()

    def losses():
        head = shared.get_output_embeddings().weight
        return [
            head_loss(decoder(row, [len(row)]), head, right.roll(-1)) for row, right in zip(ids, labels, strict=True)
        ]

    with decoder.step():
        was = [loss.item() for loss in losses()]
        first.data.add_(1)  # as an optimizer does, between steps
        assert [loss.item() for loss in losses()] == was
    with decoder.step():
        assert [loss.item() for loss in losses()] != was
    assert len(copied) == 2
    first.data.copy_(before)
    with pytest.raises(AttributeError):  # never without the adapters, in silence
        losses()


@pytest.mark.parametrize("kind", [HALVED, CHECKPOINTED, OFFLOADED])
def test_a_long_rows_mlp_goes_tile_by_tile(shared, monkeypatch, kind):
    monkeypatch.setattr("llamanb.tape.workload.MLP_TILE", 6)
    seen, compute = [], Part.compute

    def watched(part, residual, inputs):
        seen.append((part.prologue, len(inputs[0])))
        return compute(part, residual, inputs)

    monkeypatch.setattr(Part, "compute", watched)
    assert_same(shared, UNEVEN, (kind,) * 4)
    assert seen
    assert max(tokens for prologue, tokens in seen if prologue is module.SWIGLU) <= 6 < sum(UNEVEN)
    assert max(tokens for prologue, tokens in seen if prologue is module.AS_IT_IS) == sum(UNEVEN), "attention does not"


def test_what_is_kept_is_never_in_tiles(shared, monkeypatch):
    monkeypatch.setattr("llamanb.tape.workload.MLP_TILE", 6)
    assert_same(shared, UNEVEN, (STORED,) * 4)


@pytest.mark.parametrize("kind", [HALVED, CHECKPOINTED, OFFLOADED])
def test_tiles_bound_what_a_recomputed_mlp_takes(monkeypatch, kind):
    model = Architecture("tiny", 64, 3, 4, 2, 16, 512, VOCABULARY, False, 4096)
    work = Workload(model, 1, 2048, (kind,) * 3, True, "fp16", "nf4", rank=RANK)
    whole = outline(work).allocated
    monkeypatch.setattr("llamanb.tape.workload.MLP_TILE", 256)
    tiled = outline(work.replace(accumulation=3)).allocated  # another workload: outlines are remembered
    gate_and_up = 2 * 2 * 2048 * 512
    assert whole - tiled > gate_and_up
