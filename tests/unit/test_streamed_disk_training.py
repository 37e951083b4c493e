"""Whole trainings with layers that wait on disk: to the bit what resident weights give, also after a file was spoiled
meanwhile; and a disk that has no room for them."""

import errno
import threading

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from llamanb import disk
from llamanb.data.encode import load_tokenizer
from llamanb.errors import DiskFullError, ModelError
from llamanb.model import attach_adapters, load_model
from llamanb.model.homes import DiskLayer, HostLayer
from llamanb.model.load import piecewise_model
from llamanb.model.quantized import QuantizedLayers
from llamanb.model.streamed import StreamedLayers
from llamanb.tiny import CHECKPOINT
from llamanb.training import train
from tests.unit.test_streamed_training import assert_same, laid_out, quantizations, recipe, weights
from tests.unit.threads import all_end

ALL = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def resident(tmp_path_factory):
    return train(laid_out(recipe()), runs=tmp_path_factory.mktemp("resident"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hub's cache of its own; a folder of layers in it once something was loaded."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))

    def folder():
        (found,) = (tmp_path / "hf" / "llamanb-4bit").glob("*/")
        return found

    return folder


def waiting(recipe, on_disk=ALL, streamed=ALL):
    return laid_out(recipe, streamed).replace(on_disk=on_disk)


def loaded(**more):
    made = waiting(recipe(), **more)
    return load_model(made, load_tokenizer(CHECKPOINT))


def readers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("llamanb-disk")}


@pytest.mark.slow
@pytest.mark.parametrize(("on_disk", "streamed"), [(ALL, ALL), ((0, 2), ALL), ((3,), (1, 3))])
def test_losses_scores_and_adapter_are_those_of_resident_weights(
    resident, on_disk, streamed, cache, tmp_path, monkeypatch
):
    during, visit = set(), StreamedLayers.visit

    def visited(self, number):
        during.update(readers())
        visit(self, number)

    monkeypatch.setattr(StreamedLayers, "visit", visited)
    for again in (False, True):  # the second time with the files that the first one made
        run = train(waiting(recipe(), on_disk, streamed), runs=tmp_path / f"{again}")
        assert_same(run, resident)
    all_end(during)


def test_only_what_has_no_room_waits_on_disk_and_is_read_from_the_files_that_are_kept(cache, monkeypatch):
    made = quantizations(monkeypatch)
    model = loaded(on_disk=(1, 2))
    assert [type(host) for host in model.streamed.hosts.values()] == [HostLayer, DiskLayer, DiskLayer, HostLayer]
    assert model.streamed.hosts[1].path == cache() / "layer-0001.safetensors"
    assert len(made) == 4 * 7
    loaded()
    assert len(made) == 4 * 7


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_in_4_bits_is_read_from_its_own_files(shards, resident, cache, tmp_path):
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    made = LlamaForCausalLM.from_pretrained(CHECKPOINT, quantization_config=bits, device_map={"": "cpu"})
    folder = tmp_path / "bits"
    made.save_pretrained(folder, max_shard_size=made.get_memory_footprint() // shards + 10_000)
    assert len(list(folder.glob("*.safetensors"))) >= shards
    for file in [*CHECKPOINT.glob("*token*"), *CHECKPOINT.glob("chat_template*")]:
        (folder / file.name).write_bytes(file.read_bytes())
    right = train(laid_out(recipe(model=str(folder))), runs=tmp_path / "resident")
    assert_same(train(waiting(recipe(model=str(folder)), on_disk=(0, 1, 3)), runs=tmp_path / "disk"), right)
    assert not disk.layers_folder().exists(), "nothing is kept twice"


def spoil(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_a_file_that_is_spoiled_in_a_training_ends_it_and_the_next_one_goes_on(resident, cache, tmp_path, monkeypatch):
    visits, during, visit = [], set(), StreamedLayers.visit

    def visited(self, number):
        visits.append(number)
        during.update(readers())
        if self.copied and len(visits) == at:
            spoil(cache() / "layer-0002.safetensors")
        visit(self, number)

    monkeypatch.setattr(StreamedLayers, "visit", visited)
    plan, at = waiting(recipe(checkpoint_every_steps=1, eval_rows=0), (1, 2, 3)), 0
    right = train(plan, runs=tmp_path / "right")
    at, visits[:] = len(visits) // 2, []
    with pytest.raises(ModelError, match=r"layer-0002\.safetensors: it has [\d,]+ bytes, and had") as caught:
        train(plan, runs=tmp_path)
    assert "train again" in caught.value.fix
    del caught
    all_end(during)
    again = train(plan, runs=tmp_path)
    assert again.losses == right.losses == resident.losses


def test_a_disk_without_room_is_said_with_what_is_needed(cache, monkeypatch, tmp_path):
    monkeypatch.setattr("llamanb.model.quantized.SPARE_GIB", 2**30)
    with pytest.raises(DiskFullError, match=r"3 of them take [\d.]+ GiB, and [\d.]+ are free") as caught:
        loaded(on_disk=(0, 2, 3))
    assert "HF_HOME" in caught.value.fix
    assert list(cache().iterdir()) == []
    monkeypatch.setattr("llamanb.model.quantized.SPARE_GIB", 0)
    write = QuantizedLayers._write

    def full(path, data, waits):
        write(path, data[:100], waits)
        if path.name.startswith("layer-0002"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data, waits)

    monkeypatch.setattr(QuantizedLayers, "_write", staticmethod(full))
    with pytest.raises(DiskFullError, match=r"No space left on device, at .*layer-0002"):
        loaded()
    assert sorted(path.name for path in cache().glob("layer*")) == [f"layer-000{n}.safetensors" for n in (0, 1)]


def test_layers_in_memory_leave_the_room_to_those_on_disk(cache, monkeypatch):
    """Of a disk that has room for two, and both have to be on it."""
    size = sum(path.stat().st_size for path in (loaded(), cache())[1].glob("layer-0003*"))
    for path in cache().iterdir():
        path.unlink()
    monkeypatch.setattr("llamanb.model.quantized.SPARE_GIB", 0)
    used = lambda: sum(path.stat().st_size for path in cache().glob("layer*"))  # noqa: E731
    usage = disk.shutil._ntuple_diskusage
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(0, 0, 2 * size + 500 - used()))
    loaded(on_disk=(2, 3))
    assert sorted(path.name for path in cache().glob("layer*")) == [f"layer-000{n}.safetensors" for n in (2, 3)]


def test_random_weights_wait_on_disk_as_well_and_leave_no_files(cache, monkeypatch):
    config = LlamaConfig.from_pretrained(CHECKPOINT)
    right = weights(piecewise_model(waiting(recipe(), on_disk=(), streamed=()), config, None))
    model = piecewise_model(waiting(recipe(), on_disk=(0, 2, 3)), config, None)
    assert list(disk.layers_folder().glob("*/")) == []
    for number in range(4):
        model.streamed.visit(number)
        found = weights_at(model, number)
        assert found.keys() <= right.keys()
        assert all(torch.equal(found[name], right[name]) for name in found)


def weights_at(model, number):
    layer = model.get_decoder().layers[number]
    return {f"model.layers.{number}.{name}": one for name, one in weights(layer).items()}


def test_how_fast_the_disk_reads_is_measured_and_said(cache, monkeypatch, capsys):
    monkeypatch.setattr(disk, "LEAST", 1000)
    clock = iter((0.0, 1.0))
    monkeypatch.setattr(disk.time, "perf_counter", lambda: next(clock))
    attach_adapters(loaded(on_disk=(1,)), recipe())
    assert disk.measured() == (cache() / "layer-0001.safetensors").stat().st_size / 1e9
    said = "the weights of 1 of 4 layers wait on disk, which reads 0.00 GB/s; 0.50 were planned with"
    assert said in capsys.readouterr().out
