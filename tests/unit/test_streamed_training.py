"""Whole trainings with layers whose weights wait in host memory: to the bit what resident ones give."""

import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from llamanb import Card, Recipe, load_adapter, merge, plan, show_run, train
from llamanb.data.encode import load_tokenizer
from llamanb.errors import ModelError, RecipeError
from llamanb.model import attach_adapters, load_model
from llamanb.model.quantized import MANIFEST
from llamanb.model.streamed import HostEmbedding, StreamedLayers
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED
from llamanb.tiny import CHECKPOINT, DEFAULTS

CPU = Card("CPU", None)
LAYERS = (OFFLOADED, CHECKPOINTED, HALVED, STORED)


@pytest.fixture(scope="module", autouse=True)
def no_cache_of_this_user(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hf") / "hub"))
        yield


def recipe(**more):
    return Recipe(**{**DEFAULTS, "eval_rows": 4, "steps": 4, "weights": "streamed", **more})


def laid_out(recipe, streamed=()):
    """A plan as a GPU would have it, for this CPU."""
    return plan(recipe, CPU).replace(fused=True, layers=LAYERS, streamed=streamed)


def trained(runs, recipe, streamed=(), **more):
    return train(laid_out(recipe, streamed), runs=runs, **more)


@pytest.fixture(scope="module")
def resident(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("resident"), recipe())


def assert_same(run, right):
    assert run.losses == right.losses
    assert run.scores.after == right.scores.after
    got, wanted = (load_file(one.saved / "adapter_model.safetensors") for one in (run, right))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("streamed", [(0, 1, 2, 3), (1, 3)])
def test_losses_scores_and_adapter_are_those_of_resident_weights(resident, tmp_path, streamed):
    run = trained(tmp_path, recipe(), streamed)
    assert_same(run, resident)
    assert run.plan.streamed == streamed
    assert show_run(run.folder).plan == run.plan


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The tiny Llama with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    for file in CHECKPOINT.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(1).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return recipe(model=str(folder))


def test_a_token_embedding_in_host_memory_gives_the_same(untied, tmp_path, monkeypatch):
    looked_up, forward = [], HostEmbedding.forward
    monkeypatch.setattr(HostEmbedding, "forward", lambda self, ids: looked_up.append(1) or forward(self, ids))
    right = trained(tmp_path / "resident", untied)
    assert looked_up == []
    assert_same(trained(tmp_path / "streamed", untied, (1, 3)), right)
    assert len(looked_up) > 4


def test_only_an_embedding_that_is_no_head_leaves_the_card(untied):
    for asked, kind in ((untied, HostEmbedding), (recipe(), torch.nn.Embedding)):
        made = laid_out(asked, (1, 3))
        tokenizer = load_tokenizer(CHECKPOINT)
        embedding = attach_adapters(load_model(made, tokenizer), asked).get_input_embeddings()
        assert type(embedding) is kind
        assert embedding.num_embeddings == len(embedding.table if kind is HostEmbedding else embedding.weight)
    there = laid_out(untied, (1, 3))
    table = load_model(there, tokenizer).get_input_embeddings().table
    wanted = load_file(f"{untied.model}/model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(table, wanted.to(table.dtype))


def test_a_host_embedding_is_where_the_model_is_and_its_table_where_it_was():
    """A GPU that is none: what moves a model must not move the table."""
    table = torch.randn(9, 4)
    moved = torch.nn.Sequential(HostEmbedding(table, "cpu")).to("meta")
    assert next(moved.parameters()).device.type == "meta"
    assert (moved[0].table.device.type, sum(p.numel() for p in moved.parameters())) == ("cpu", 0)
    assert torch.equal(HostEmbedding(table, "cpu")(torch.tensor([[3, 3], [8, 0]])), table[[3, 3, 8, 0]].view(2, 2, 4))


def test_each_step_says_how_long_it_waited_for_weights(tmp_path, monkeypatch):
    waited = iter((0.5, 0.25, 0.125, 0.0625))
    monkeypatch.setattr(StreamedLayers, "stalled_s", lambda self: next(waited))
    run = trained(tmp_path, recipe(), (1, 3))
    assert [step.stall_s for step in run.timeline.steps] == [0.5, 0.25, 0.125, 0.0625]
    assert show_run(run.folder).timeline.steps == run.timeline.steps


def test_the_adapter_loads_and_merges_as_any_other(tmp_path, resident):
    run = trained(tmp_path, recipe(), (0, 1, 2, 3))
    model, _ = load_adapter(run.folder)
    assert not hasattr(model.get_base_model(), "streamed"), "a CPU holds all of it"
    merged, right = merge(run), merge(resident)
    assert (merged / "model.safetensors").read_bytes() == (right / "model.safetensors").read_bytes()


def test_answers_are_given_to_one_batch_of_rows_since_each_word_takes_all_weights(tmp_path, capsys):
    run = trained(tmp_path, recipe(eval_rows=20), (0, 1, 2, 3))
    assert "answering 16 of 20 held-out rows: each word of an answer brings" in capsys.readouterr().out
    rows = run.scores.after.rows
    assert [row.exact is None for row in rows] == [False] * 16 + [True] * 4
    assert all(row.nats > 0 for row in rows), "the loss is every row's"


def test_a_run_that_was_cut_off_goes_on(resident, tmp_path):
    short = recipe(steps=4, checkpoint_every_steps=2)
    run = trained(tmp_path, short.replace(steps=2), (0, 1, 2, 3))
    assert len(run.losses) == 2
    again = trained(tmp_path, short, (1, 3), resume=True)
    assert len(again.losses) == 4
    assert again.losses[:2] == run.losses


def test_a_checkpoint_that_is_in_4_bits_already(tmp_path):
    made = LlamaForCausalLM.from_pretrained(
        CHECKPOINT,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        device_map={"": "cpu"},
    )
    folder = tmp_path / "bits"
    made.save_pretrained(folder)
    for file in CHECKPOINT.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    for file in CHECKPOINT.glob("chat_template*"):
        (folder / file.name).write_bytes(file.read_bytes())
    runs = [trained(tmp_path / "runs", recipe(model=str(folder)), streamed) for streamed in ((), (0, 1, 2, 3))]
    assert_same(*runs)


def test_a_weight_that_is_not_there_is_named(tmp_path):
    for file in CHECKPOINT.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj\.weight is not among"):
        trained(tmp_path / "runs", recipe(model=str(tmp_path)), (0, 1, 2, 3))


def changed(folder, **config):
    """The tiny Llama with another config."""
    for file in CHECKPOINT.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return recipe(model=str(folder), steps=1, eval_rows=0)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"attention_bias": True}, "biases, which are not brought along"),
        ({"mlp_bias": True}, "biases, which are not brought along"),
        ({"attention_dropout": 0.1}, "attention with dropout"),
        ({"hidden_act": "gelu"}, "gelu in the MLP"),
    ],
)
def test_a_llama_that_cannot_be_streamed_is_no_other_one_that_can(tmp_path, config, why):
    with pytest.raises(ModelError, match=why) as caught:
        trained(tmp_path / "runs", changed(tmp_path, **config), (0, 1, 2, 3))
    assert caught.value.fix == 'weights = "resident"'


@pytest.mark.parametrize("more", [{"method": "lora"}, {"method": "qlora-int8"}, {"dropout": 0.1}, {"dora": True}])
def test_what_cannot_be_streamed_is_refused_before_anything_is_read(more):
    with pytest.raises(RecipeError, match="weights = 'streamed' is for adapters over 4-bit"):
        recipe(**more)


def test_a_plan_for_a_gpu_says_what_waits_in_host_memory():
    made = plan(Recipe(model="meta-llama/Llama-3.3-70B-Instruct", max_length=2048, weights="streamed"), "RTX 4090")
    assert made.fits
    assert len(made.streamed) == 80
    assert made.streamed_gib == pytest.approx(35, abs=1)
    assert "of 80 of 80 layers in host memory" in str(made)
    assert json.loads(made.to_json())["streamed"] == list(range(80))


# what is quantized once


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hub's cache of its own; a folder of layers in it once something was loaded."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))

    def folder():
        (found,) = (tmp_path / "hf" / "llamanb-4bit").iterdir()
        return found

    return folder


def quantizations(monkeypatch) -> list:
    made, real = [], bnb.functional.quantize_4bit
    monkeypatch.setattr(bnb.functional, "quantize_4bit", lambda *args, **more: made.append(1) or real(*args, **more))
    return made


def loaded(**more):
    return load_model(laid_out(recipe(**more), (0, 1, 2, 3)), load_tokenizer(CHECKPOINT))


def test_streamed_weights_stay_when_the_whole_model_is_moved_as_accelerate_does():
    made, moved = laid_out(recipe(), (1, 3)), set()
    model = attach_adapters(load_model(made, load_tokenizer(CHECKPOINT)), made.recipe)

    def move(tensor):
        moved.add(tensor.data_ptr())
        return tensor

    model._apply(move)
    linear = {name: module.weight for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(linear) == 4 * 7
    for name, weight in linear.items():
        assert (weight.data_ptr() in moved) == (".layers.0." in name or ".layers.2." in name), name
    assert all(p.data_ptr() in moved for p in model.parameters() if p.requires_grad)


def weights(model) -> dict:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            found[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return found


def test_weights_are_quantized_once_for_each_way(cache, monkeypatch):
    made = quantizations(monkeypatch)
    first, again = weights(loaded()), weights(loaded())
    assert len(made) == 4 * 7
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    files = [f"layer-000{n}.safetensors" for n in range(4)]
    assert sorted(path.name for path in cache().iterdir()) == [*files, MANIFEST]
    loaded(double_quant=False)
    loaded(method="qlora-fp4")
    assert len(made) == 3 * 4 * 7


def test_what_was_cut_off_goes_on_and_what_was_changed_is_made_again(cache, monkeypatch, capsys):
    first = weights(loaded())
    folder = cache()
    (folder / "layer-0001.safetensors").unlink()
    file = folder / "layer-0002.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    made = quantizations(monkeypatch)
    again = weights(loaded())
    assert len(made) == 2 * 7
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert "layer-0002.safetensors is not what was written there" in capsys.readouterr().out
    (folder / MANIFEST).write_text("[1, 2")
    loaded()
    assert len(made) == 6 * 7, "without a manifest nothing there counts"


def test_without_room_it_is_quantized_each_time(cache, monkeypatch, tmp_path):
    made = quantizations(monkeypatch)
    monkeypatch.setattr("llamanb.model.quantized.SPARE_GIB", 2**30)
    first, again = weights(loaded()), weights(loaded())
    assert len(made) == 2 * 4 * 7
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert list(cache().iterdir()) == []


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "hf").write_text("a file, and no folder")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    assert loaded()
    assert "not kept for the next time" in capsys.readouterr().out
