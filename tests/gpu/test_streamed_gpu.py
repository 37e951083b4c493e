"""Streamed layers on a GPU, to the bit what resident ones give: pytest tests/gpu/test_streamed_gpu.py -s

With copies that come late and buffers that are spoiled as soon as another layer may have them. Layers of 70B's size
too: a buffer that is given away too early shows only where copies take long, and in the backward pass.
"""

import gc
import time
from dataclasses import replace

import pytest
import torch

from llamanb import Card, Recipe
from llamanb.architecture import architecture
from llamanb.model import attach_adapters, homes, load_model
from llamanb.model.fused import FusedDecoder
from llamanb.model.head import head_loss
from llamanb.model.homes import DiskLayer
from llamanb.model.streamed import StreamedLayers
from llamanb.planner import search
from llamanb.rehearsal import _tokenizer
from llamanb.tape import CHECKPOINTED, STORED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
SHAPES = {
    "1B": ("meta-llama/Llama-3.2-1B-Instruct", 16),
    "8B": ("meta-llama/Llama-3.1-8B-Instruct", 10),
    "70B": ("meta-llama/Llama-3.3-70B-Instruct", 7),
}
LENGTHS = [256, 31, 200]
CYCLES = 20_000_000
"""About 10 ms of a GPU: longer than a layer takes."""


def model_of(name: str, depth: int, streamed: tuple[int, ...], on_disk: tuple[int, ...] = ()):
    shape = replace(architecture(name), layers=depth)
    recipe = Recipe(model=name, precision="bf16", micro_batch_size=1, effective_batch_size=1)
    plan = search(recipe, replace(Card.present(), name="here"), shape, force=True)
    plan = plan.replace(kernel="flash", layers=(CHECKPOINTED,) * depth, streamed=streamed, on_disk=on_disk)
    model = attach_adapters(load_model(plan, _tokenizer(), shape), recipe).train()
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in parameter_name:
                parameter.data.copy_(torch.randn(parameter.shape) * 0.01)
    return model


def step(decoder, model, seed: int) -> tuple[float, torch.Tensor, dict]:
    torch.manual_seed(seed)
    ids = torch.randint(0, 128_000, (sum(LENGTHS),)).cuda()
    labels = torch.cat([torch.cat((row[1:], row.new_full((1,), -100))) for row in ids.split(LENGTHS)])
    model.zero_grad()
    with decoder.step():
        hidden = decoder(ids, LENGTHS)
        loss = head_loss(hidden, model.get_output_embeddings().weight, labels) / sum(LENGTHS)
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), hidden.detach().clone(), found


def assert_equal(one, other):
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])
    assert [name for name in one[2] if not torch.equal(one[2][name], other[2][name])] == []


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    gc.collect()
    torch.cuda.empty_cache()


def late_and_spoiled(buffer, memory):
    """A copy that comes late, into a buffer whose last content is gone at once."""
    buffer.fill_(255)
    torch.cuda._sleep(CYCLES)
    buffer.copy_(memory, non_blocking=True)


@pytest.mark.parametrize("size", SHAPES)
def test_streamed_is_resident_bit_for_bit(size, deterministic, monkeypatch):
    name, depth = SHAPES[size]
    layouts = [(CHECKPOINTED,) * depth, (CHECKPOINTED, STORED) * (depth // 2) + (STORED,) * (depth % 2)]
    model = model_of(name, depth, ())
    right = {}
    for kinds in layouts:
        decoder = FusedDecoder(model, kinds, "flash")
        first, again = step(decoder, model, 0), step(decoder, model, 0)
        assert_equal(first, again)
        right[kinds] = [step(decoder, model, seed) for seed in range(3)]
    del model, decoder
    gc.collect()
    torch.cuda.empty_cache()
    for late in (False, True):
        if late:
            monkeypatch.setattr(StreamedLayers, "_copy", staticmethod(late_and_spoiled))
        for buffers, numbers in ((2, tuple(range(depth))), (3, tuple(range(depth))), (2, tuple(range(0, depth, 2)))):
            monkeypatch.setattr("llamanb.model.piecewise.BUFFERS", buffers)
            model = model_of(name, depth, numbers)
            streamed = model.get_base_model().streamed
            assert streamed.refused == ""
            assert len(streamed.buffers) == buffers
            for kinds in layouts:
                decoder = FusedDecoder(model, kinds, "flash", streamed)
                for seed in range(3):
                    assert_equal(step(decoder, model, seed), right[kinds][seed])
            for n in range(50 if size == "8B" and not late else 0):
                assert_equal(step(decoder, model, n % 3), right[kinds][n % 3])
            words = f"{size}, {buffers} buffers, {len(numbers)} of {depth} layers, late={late}"
            print(f"{words}: equal, {streamed.stalled_s():.2f} s waited")
            del model, decoder, streamed
            gc.collect()
            torch.cuda.empty_cache()


@pytest.mark.parametrize("size", SHAPES)
def test_layers_from_disk_are_resident_ones_bit_for_bit(size, deterministic, monkeypatch):
    """Also where they are read late, into memory that is spoiled as soon as it may be read into again."""
    name, depth = SHAPES[size]
    kinds = (CHECKPOINTED, STORED) * (depth // 2) + (STORED,) * (depth % 2)
    model = model_of(name, depth, ())
    right = [step(FusedDecoder(model, kinds, "flash"), model, seed) for seed in range(3)]
    del model
    gc.collect()
    torch.cuda.empty_cache()
    read, every = homes._read, tuple(range(depth))

    def late(layer, memory, copied):
        if copied is not None:
            copied.synchronize()
        memory.fill_(255)
        time.sleep(0.05)
        read(layer, memory, copied)

    for is_late, buffers, on_disk in ((False, 2, every), (True, 2, every), (True, 3, every[::2])):
        with monkeypatch.context() as patch:
            if is_late:
                patch.setattr(homes, "_read", late)
                patch.setattr(StreamedLayers, "_copy", staticmethod(late_and_spoiled))
            patch.setattr("llamanb.model.piecewise.BUFFERS", buffers)
            model = model_of(name, depth, every, on_disk)
            streamed = model.get_base_model().streamed
            assert [isinstance(streamed.hosts[n], DiskLayer) for n in every] == [n in on_disk for n in every]
            assert streamed.refused == ""
            decoder = FusedDecoder(model, kinds, "flash", streamed)
            for seed in range(3):
                assert_equal(step(decoder, model, seed), right[seed])
            waited = streamed.stalled_s()
            assert waited > 0.05 * len(on_disk) / 2 or not is_late, "waiting for the disk is seen"
            print(
                f"{size}, {buffers} buffers, {len(on_disk)} of {depth} on disk, late={is_late}: {waited:.2f} s waited"
            )
            del model, decoder, streamed
            gc.collect()
            torch.cuda.empty_cache()


def test_a_weight_that_is_read_without_a_visit_gives_no_wrong_number(deterministic):
    """An error, or what a resident one gives: a card can read pinned host memory."""
    name, depth = SHAPES["1B"]
    kinds = (CHECKPOINTED,) * depth
    resident = model_of(name, depth, ())
    right = step(FusedDecoder(resident, kinds, "flash"), resident, 0)
    model = model_of(name, depth, tuple(range(depth)))
    try:
        found = step(FusedDecoder(model, kinds, "flash"), model, 0)  # a decoder that knows nothing of streamed layers
    except (RuntimeError, ValueError) as error:
        print(f"an error: {str(error)[:100]}")
    else:
        print("read over the link")
        assert_equal(found, right)
