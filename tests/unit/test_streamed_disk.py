"""Layers that wait on disk: bit for bit what resident ones give, however late they are read, and what comes of files
that are not what they were."""

import errno
import gc
import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from llamanb import Recipe, disk, plan
from llamanb.errors import ModelError
from llamanb.model import homes
from llamanb.model.homes import DiskLayer, HostLayer, Staging
from llamanb.model.streamed import StreamedLayers
from llamanb.model.weight_files import WeightFile
from llamanb.tape import CHECKPOINTED, STORED
from tests.unit.small_llama import tiny
from tests.unit.test_fused import rows_of
from tests.unit.test_streamed import DEEP, MIXED, assert_equal, quantized, trained
from tests.unit.threads import all_end

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
ALL = tuple(range(DEEP))


@pytest.fixture(params=[False, True], ids=["16 bits", "nf4"])
def make(request):
    def make_one():
        model = tiny(DEEP, base=WIDE)
        return quantized(model) if request.param else model

    return make_one


def disk_layer(layer, number, folder) -> DiskLayer:
    """With its weights in a file of their own, as bitsandbytes names them."""
    tensors = {}
    for path, one in layer.named_modules():
        if isinstance(one, torch.nn.Linear) and not one.weight.requires_grad:
            tensors[f"{number}.{path}.weight"] = one.weight.data
            state = getattr(one.weight, "quant_state", None)
            for part, value in state.as_dict(packed=True).items() if state else ():
                tensors[f"{number}.{path}.weight.{part}"] = value
    save_file(tensors, folder / f"{number}.safetensors")
    file = WeightFile(folder / f"{number}.safetensors", "mend it")
    return DiskLayer(layer, file.span, str(number))


def streamed_of(model, folder, on_disk=ALL, numbers=ALL, buffers=2) -> StreamedLayers:
    layers = model.get_decoder().layers
    homes = {
        n: disk_layer(layers[n], n, folder) if n in on_disk else HostLayer(layers[n], pinned=False) for n in numbers
    }
    return StreamedLayers(layers, homes, buffers, "cpu")


def as_late_as_can_be(monkeypatch):
    """Nothing is read before somebody waits for it, and no number lies where it will be; nor where it was, once it is
    copied."""
    asked, take, read, give_back = threading.Event(), Staging.take, homes._read, Staging.give_back

    def taken(self, number):
        asked.set()
        try:
            return take(self, number)
        finally:
            asked.clear()

    def late(layer, memory, copied):
        memory.fill_(255)
        asked.wait()
        read(layer, memory, copied)

    def spoiled(self, slot, copied):
        slot.memory.fill_(255)
        give_back(self, slot, copied)

    monkeypatch.setattr(Staging, "take", taken)
    monkeypatch.setattr(homes, "_read", late)
    monkeypatch.setattr(Staging, "give_back", spoiled)
    return asked


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("layers", [(CHECKPOINTED,) * DEEP, (STORED,) * DEEP, MIXED])
@pytest.mark.parametrize(
    ("on_disk", "numbers", "buffers"),
    [(ALL, ALL, 2), (ALL, ALL, 3), ((0, 3, 6), ALL, 2), ((1, 2, 4, 5), ALL, 3), ((4,), (1, 4, 6), 2)],
)
def test_loss_and_gradients_are_those_of_resident_layers(
    make, layers, on_disk, numbers, buffers, late, tmp_path, monkeypatch
):
    right = trained(make(), layers)
    asked = as_late_as_can_be(monkeypatch) if late else None
    model = make()
    assert_equal(trained(model, layers, streamed_of(model, tmp_path, on_disk, numbers, buffers)), right)
    if late:
        asked.set()  # what is still being read


def test_orders_that_were_not_foreseen_read_the_same_weights(make, tmp_path, monkeypatch):
    ids = rows_of((9,))[0][0][None]
    right = make()(input_ids=ids).logits
    model = make()
    asked = as_late_as_can_be(monkeypatch)
    streamed = streamed_of(model, tmp_path, on_disk=(0, 2, 3, 5, 6))
    for order in ((), (6, 0, 3), (5, 2, 5, 2)):
        for number in order:
            streamed.visit(number)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, right)
    trained(model, (CHECKPOINTED,) * DEEP, streamed)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, right)
    asked.set()


def test_those_that_come_next_are_read_ahead(make, tmp_path):
    streamed = streamed_of(make(), tmp_path)
    for number in range(DEEP - 3):
        streamed.visit(number)
        assert {slot.number for slot in streamed.staging.slots} == {number + 2, number + 3}


def test_none_is_read_in_vain(make, tmp_path):
    model = make()
    streamed = streamed_of(model, tmp_path)
    trained(model, (CHECKPOINTED,) * DEEP, streamed)
    still = sum(streamed.hosts[slot.number].size for slot in streamed.staging.slots if slot.number is not None)
    assert streamed.staging.read == streamed.copied + still


def test_without_a_visit_nothing_can_be_read(make, tmp_path):
    model = make()
    streamed_of(model, tmp_path)
    weights = [p for name, p in model.named_parameters() if "_proj.base_layer.weight" in name]
    assert [weight.numel() for weight in weights] == [0] * 7 * DEEP


def test_what_each_pass_brings_is_said(make, tmp_path):
    streamed = streamed_of(make(), tmp_path, on_disk=(1, 2))
    sizes = [streamed.hosts[n].size / 1e9 for n in ALL]
    said = f"{sum(sizes):.3g} GB of weights to the card, {sizes[1] + sizes[2]:.3g} of them from disk"
    assert streamed.brings == said


# files that are not what they were


def grows(path):
    with path.open("ab") as file:
        file.write(b"x")


def is_cut_off(path):
    os.truncate(path, path.stat().st_size - 1)


def is_written_to(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))  # not as a clock has it that may stand still between the two


@pytest.mark.parametrize(
    ("change", "why"),
    [(grows, "bytes, and had"), (is_cut_off, "bytes, and had"), (is_written_to, "it was written to since")],
)
def test_a_file_that_changes_meanwhile_is_an_error_that_names_it(make, change, why, tmp_path):
    model = make()
    streamed = streamed_of(model, tmp_path)
    change(tmp_path / "5.safetensors")
    with pytest.raises(ModelError, match=rf"5\.safetensors: .*{why}") as caught:
        trained(model, (CHECKPOINTED,) * DEEP, streamed)
    assert caught.value.fix == "mend it"
    threads = set(streamed.staging._thread._threads)
    del caught, streamed, model
    all_end(threads)


def test_a_file_that_is_deleted_or_replaced_stays_what_was_opened(make, tmp_path):
    right = trained(make(), (CHECKPOINTED,) * DEEP)
    model = make()
    streamed = streamed_of(model, tmp_path)
    (tmp_path / "2.safetensors").unlink()
    (tmp_path / "other").write_bytes(b"something else")
    (tmp_path / "other").replace(tmp_path / "3.safetensors")
    assert_equal(trained(model, (CHECKPOINTED,) * DEEP, streamed), right)


def test_an_error_in_the_thread_is_one_in_training_and_the_thread_ends(make, tmp_path, monkeypatch):
    right, model = trained(make(), (CHECKPOINTED,) * DEEP), make()
    streamed, real, reads = streamed_of(model, tmp_path), disk.read_into, []

    def fails(fd, memory, offset):
        reads.append(threading.current_thread().name)
        if 150 < len(reads) < 200:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, memory, offset)

    monkeypatch.setattr(disk, "read_into", fails)
    with pytest.raises(ModelError, match=r"\d\.safetensors: OSError: .*Input/output error"):
        trained(model, (CHECKPOINTED,) * DEEP, streamed)
    assert all(name.startswith("llamanb-disk") for name in reads), "never in the thread that trains"
    reads += [""] * 200
    model.zero_grad()
    assert_equal(trained(model, (CHECKPOINTED,) * DEEP, streamed), right)  # the disk is there again
    threads = set(streamed.staging._thread._threads)
    assert {thread.is_alive() for thread in threads} == {True}
    del streamed, model
    all_end(threads)


def test_a_file_that_holds_something_else_is_refused(make, tmp_path):
    layer = make().get_decoder().layers[0]
    disk_layer(layer, 0, tmp_path)  # and the layer lets go of its weights
    other = tiny(1, base=WIDE | {"intermediate_size": 64}).get_decoder().layers[0]
    file = WeightFile(tmp_path / "0.safetensors", "")
    with pytest.raises(ModelError, match="cannot wait on disk") as caught:
        DiskLayer(other, file.span, "0")
    assert "bytes" in caught.value.why


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x04" + b"\0" * 7 + b"null"])
def test_what_is_no_file_of_weights_is_an_error_that_names_it(content, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.safetensors"):
        WeightFile(tmp_path / "bad.safetensors", "mend it")
    with pytest.raises(ModelError, match="FileNotFoundError"):
        WeightFile(tmp_path / "missing.safetensors", "mend it")


def test_what_was_read_leaves_the_page_cache(make, tmp_path, monkeypatch):
    """Asked for in as many bytes as were read: whether the kernel does it is the file system's business."""
    dropped = []
    monkeypatch.setattr(disk, "PIECE", 1000)
    monkeypatch.setattr(
        disk.os, "posix_fadvise", lambda fd, at, size, how: how == os.POSIX_FADV_DONTNEED and dropped.append((at, size))
    )
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 20)
    fd, memory = os.open(path, os.O_RDONLY), bytearray(4500)
    assert disk.read_into(fd, memoryview(memory), 100) == 4500
    assert memory == path.read_bytes()[100:4600]
    assert (dropped[-1], len(dropped)) == ((100, 4500), 5)
    assert disk.read_into(fd, memoryview(memory), 5000) == 120, "the file ends"
    os.close(fd)


def test_memory_that_cannot_be_had_is_one_error(monkeypatch):
    """And not a second one, when what holds it goes."""
    beside = []
    monkeypatch.setattr(sys, "unraisablehook", beside.append)
    with pytest.raises(RuntimeError, match="memory"):
        homes.HostMemory().take(2**60, pinned=False)
    gc.collect()
    assert beside == []


def test_ranks_measure_the_disk_one_at_a_time_and_rank_0_says_it(monkeypatch, capsys):
    """Layers that wait there were read by both; its rate is the machine's."""
    from llamanb.model import piecewise
    from llamanb.scale.sharded import Sharing

    order = []
    model = SimpleNamespace(streamed=SimpleNamespace(hosts={0: SimpleNamespace(path="a")}))
    monkeypatch.setattr(piecewise, "load_piecewise", lambda *_, **__: model)
    monkeypatch.setattr(piecewise, "quantized", lambda source, *_: source)
    monkeypatch.setattr(disk, "measure", lambda path: order.append("measured") or 0.5)
    made = plan(Recipe(model="meta-llama/Llama-3.1-8B-Instruct"), "T4").replace(streamed=(0,), on_disk=(0,))
    for number in range(2):
        ranks = SimpleNamespace(number=number, all_of=lambda _: order.append("met"))
        cpu = torch.device("cpu")
        piecewise.load_planned(made, None, None, (None, frozenset()), torch.float16, cpu, Sharing(ranks))
        assert order == (["met", "measured", "met"] if number == 0 else ["met", "met"])
        assert ("wait on disk, which reads 0.50 GB/s" in capsys.readouterr().out) == (number == 0)
        order.clear()
