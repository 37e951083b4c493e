"""Merged weights against base + adapter, and all that is refused before anything is written."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from llamanb import merge
from llamanb.errors import DiskFullError, ModelError, RecipeError
from llamanb.export import merging, read, shards, stored
from llamanb.export.merging import HostMemoryError
from llamanb.export.source import WrongBaseError, WrongRevisionError
from llamanb.export.stored import MissingShardError
from tests.adapted import adapted_run
from tests.checkpoints import make_checkpoint

IDS = torch.arange(40, 90)[None]
SMALL = {"rank": 4, "alpha": 8.0}


@pytest.fixture
def made(mini, tmp_path):
    return lambda name="run", **fields: (
        adapted_run(tmp_path / name, **{"model": str(mini), **SMALL, **fields}),
        tmp_path / name,
    )


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.float()(IDS).logits


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


METHODS = [
    {"method": "qlora-nf4"},
    {"method": "qlora-nf4", "double_quant": False, "rslora": True},
    {"method": "qlora-nf4", "dora": True},
    {"method": "qlora-nf4", "precision": "bf16"},
    {"method": "qlora-fp4", "targets": ("q_proj", "down_proj")},
    {"method": "qlora-int8"},
    {"method": "lora", "dora": True, "rslora": True},
]


@pytest.mark.parametrize("fields", METHODS, ids=lambda f: " ".join(f"{v}" for v in f.values()))
def test_merged_is_base_and_adapter(made, fields):
    model, run = made(**fields)
    wanted = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            base = dequantize_module_weight(layer.base_layer).float()
            whole = base + layer.get_delta_weight("default").float()
            if fields.get("dora"):
                length = layer.lora_magnitude_vector["default"].weight.detach()
                whole *= (length / whole.norm(dim=1))[:, None]
            wanted[name] = whole.detach()
    merged = weights(merge(run))
    for name, whole in wanted.items():
        assert torch.allclose(merged[f"{name}.weight"].float(), whole, rtol=2e-3, atol=1e-6), name
    loaded = LlamaForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    if "int8" not in fields["method"] and "precision" not in fields:  # whose arithmetic rounds more than a merge does
        assert (logits(loaded) - logits(model)).abs().max() < 2e-3 * logits(model).abs().max()


@pytest.mark.parametrize("fields", METHODS[:6], ids=lambda f: " ".join(f"{v}" for v in f.values()))
def test_what_was_trained_on_is_made_again_to_the_bit(made, monkeypatch, fields):
    monkeypatch.setattr(read, "AT_ONCE", 64 * 64)  # several pieces a weight, whose constants belong together
    model, run = made(**{**fields, "targets": ["k_proj"], "dora": False})
    merged = weights(merge(run, dtype="bf16" if fields.get("precision") else "fp16"))
    for name, layer in model.get_base_model().named_modules():
        if name.endswith(("q_proj", "down_proj", "up_proj")):
            there = merged[f"{name}.weight"]
            assert torch.equal(there, dequantize_module_weight(layer).to(there.dtype)), name


def test_original_is_the_checkpoint_s_own_weights(made, mini):
    model, run = made(targets=["q_proj"])
    trained, original, own = weights(merge(run)), weights(merge(run, base="original")), weights(mini)
    q, k = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    delta = model.get_base_model().model.layers[0].self_attn.q_proj.get_delta_weight("default").detach()
    assert torch.equal(original[k], own[k].half())
    assert not torch.equal(trained[k], own[k].half())
    assert torch.allclose(original[q].float(), own[q] + delta, rtol=1e-3, atol=1e-6)
    assert original.keys() == own.keys()


def test_a_checkpoint_stored_in_4_bits(made, mini, tmp_path):
    base, _ = made("first")
    bits = tmp_path / "bits"
    base.unload().save_pretrained(bits)
    for path in mini.glob("tokenizer*"):
        shutil.copy(path, bits)
    _, run = made("second", model=str(bits))
    assert weights(bits)["model.layers.0.self_attn.q_proj.weight"].dtype == torch.uint8
    merged, there = weights(merge(run)), PeftModel.from_pretrained(_loaded(run), run / "adapter")
    assert (
        logits(LlamaForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)) - logits(there)
    ).abs().max() < 1e-2
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}
    assert "quantization_config" not in json.loads((run / "merged" / "config.json").read_text())
    with pytest.raises(RecipeError, match="no 16-bit weights"):
        merge(run, base="original")
    merge(run, base="original", checkpoint=mini)  # what it was made from
    assert (run / "merged-original" / "model.safetensors").exists()


def _loaded(run):
    from llamanb import Card, plan
    from llamanb.data.encode import load_tokenizer
    from llamanb.model import load_model
    from llamanb.recipe import Recipe

    recipe = Recipe.load(run / "recipe.json")
    return load_model(plan(recipe, Card("CPU", None)), load_tokenizer(run / "adapter"))


def test_an_adapter_of_peft_s_own_with_patterns(mini, tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 8},
        alpha_pattern={r"layers\.1\.self_attn\.v_proj": 3},
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(mini), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    merged = weights(merge(tmp_path / "adapter", tmp_path / "out", base="original", checkpoint=mini))
    for name, whole in model.merge_and_unload().state_dict().items():
        if name != "lm_head.weight":
            assert torch.allclose(merged[name].float(), whole, rtol=1e-3, atol=1e-6), name
    with pytest.raises(RecipeError, match="is not known"):
        merge(tmp_path / "adapter", tmp_path / "other", checkpoint=mini)


def test_shards_load_and_the_same_merge_is_not_made_twice(made, small_shards, capsys):
    model, run = made(method="lora")
    there = merge(run)
    index = json.loads((there / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(there.glob("*.safetensors"))) > 2
    assert (logits(LlamaForCausalLM.from_pretrained(there, dtype=torch.float32)) - logits(model)).abs().max() < 1e-2
    capsys.readouterr()
    assert merge(run) == there
    assert "merged already" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="not this merge"):
        merge(run, dtype="bf16")
    ends = json.loads((there / "generation_config.json").read_text())["eos_token_id"]
    assert len(ends) == 3, "end of turn, of message and of text"
    assert "base model's licence" in (there / "README.md").read_text()


def test_an_interrupted_merge_goes_on(made, small_shards, monkeypatch, tmp_path, capsys):
    _, run = made()
    whole, write, left = files(merge(run, tmp_path / "whole")), shards.write_safetensors, [3]

    def fails(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(shards, "write_safetensors", fails)
    with pytest.raises(KeyboardInterrupt):
        merge(run)
    aside = run / "merged.aside"
    assert not (run / "merged").exists()
    first, second = sorted(aside.glob("*.safetensors"))[:2]
    second.write_bytes(second.read_bytes()[:-1] + b"x")  # spoiled since
    was = first.stat().st_mtime_ns
    left[0] = 10**6
    capsys.readouterr()
    assert files(merge(run)) == whole
    assert (run / "merged" / first.name).stat().st_mtime_ns == was
    assert "2 of" in capsys.readouterr().out
    assert not aside.exists()


def test_what_was_left_of_another_merge_does_not_count(made, small_shards, monkeypatch):
    _, run = made()
    monkeypatch.setattr(merging, "write_small_files", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge(run)
    monkeypatch.undo()
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    merged = weights(merge(run, dtype="bf16"))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


# --- refused, with nothing written


def refused(error, match, run, **options):
    before = sorted(run.rglob("*"))
    with pytest.raises(error, match=match):
        merge(run, **options)
    assert sorted(run.rglob("*")) == before


def test_a_base_of_another_shape(made, tmp_path):
    _, run = made()
    other = make_checkpoint("mini", tmp_path / "other", intermediate_size=192)
    refused(WrongBaseError, "is not for", run, checkpoint=other)


def test_another_revision_of_the_base(made, mini, tmp_path):
    _, run = made()
    moved = shutil.copytree(mini, tmp_path / "moved")
    merge(run, tmp_path / "out", checkpoint=moved)
    model = LlamaForCausalLM.from_pretrained(moved)
    model.model.layers[1].mlp.up_proj.weight.data += 1e-3
    model.save_pretrained(moved)
    refused(WrongRevisionError, "another revision", run, checkpoint=moved)
    refused(WrongRevisionError, "another revision", run, checkpoint=moved, base="original")


@pytest.mark.parametrize("how", ["gone", "cut", "a tensor"])
def test_a_shard_that_is_not_there(made, tmp_path, mini, how):
    base = tmp_path / "base"
    LlamaForCausalLM.from_pretrained(mini).save_pretrained(base, max_shard_size="100KB")
    for path in mini.glob("tokenizer*"):
        shutil.copy(path, base)
    _, run = made(model=str(base))
    shard = sorted(base.glob("*.safetensors"))[1]
    if how == "gone":
        shard.unlink()
    elif how == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        index = base / "model.safetensors.index.json"
        fields = json.loads(index.read_text())
        name = next(name for name, file in fields["weight_map"].items() if file == shard.name)
        fields["weight_map"][name] = sorted(base.glob("*.safetensors"))[0].name
        fields["weight_map"] = {n: f for n, f in fields["weight_map"].items() if f != shard.name}
        index.write_text(json.dumps(fields))
    refused(MissingShardError, "not complete", run)


def test_too_little_disk_or_memory(made, monkeypatch):
    _, run = made()
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda place: SimpleNamespace(free=10**5))
    refused(DiskFullError, "0.0 GB are free", run)
    monkeypatch.undo()
    monkeypatch.setattr(merging, "host_memory", lambda: (12.0, 0.5, 12.0))
    refused(HostMemoryError, "too little host memory", run)


@pytest.mark.parametrize(
    ("field", "value"),
    [("bias", "all"), ("modules_to_save", ["lm_head"]), ("fan_in_fan_out", True), ("init_lora_weights", "pissa"),
     ("peft_type", "LOHA"), ("use_qalora", True), ("a_field_of_tomorrow", 1)],
)  # fmt: skip
def test_an_adapter_that_is_more_than_a_sum(made, field, value):
    _, run = made()
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    refused(ModelError, field, run)


def test_no_adapter_at_all(made, tmp_path):
    refused(ModelError, "holds no adapter", tmp_path)
    _, run = made()
    refused(RecipeError, "16 bits wide", run, dtype="nf4")
    refused(RecipeError, "base = 'other'", run, base="other")


def test_4_bits_that_a_cpu_could_not_dequantize(made, tmp_path, monkeypatch):
    """From before they were refused when they are planned for."""
    base = make_checkpoint("mini", tmp_path / "odd", hidden_size=96, head_dim=24)
    with monkeypatch.context() as patch:
        patch.setattr("llamanb.planner.require_method", lambda *args: None)
        _, run = made(model=str(base))
    refused(ModelError, "reads past its constants", run)
    merge(run, base="original")


# --- checked, before it counts


def test_a_wrong_product_is_noticed(made, monkeypatch):
    _, run = made()
    right = merging._merged

    def wrong(rows, parts, first):
        merged = right(rows, parts, first)
        merged[-1] *= 1.05
        return merged

    monkeypatch.setattr(merging, "_merged", wrong)
    with pytest.raises(ModelError, match="came out wrong"):
        merge(run)
    assert not (run / "merged").exists()


def test_a_file_that_reads_back_otherwise_is_noticed(made, monkeypatch):
    _, run = made()
    monkeypatch.setattr(merging, "header", lambda path: dict(_rolled(stored.header(path))))
    with pytest.raises(ModelError, match="came out wrong"):
        merge(run)


def _rolled(found):
    """Each tensor a row further in the file."""
    for name, tensor in found.items():
        row = tensor.size // tensor.shape[0]
        yield name, tensor._replace(begin=tensor.begin - row)


def test_weights_too_large_for_fp16(made, tmp_path, mini):
    base = tmp_path / "large"
    model = LlamaForCausalLM.from_pretrained(mini)
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = 1e5
    model.save_pretrained(base)
    for path in mini.glob("tokenizer*"):
        shutil.copy(path, base)
    _, run = made(model=str(base), method="lora")
    with pytest.raises(ModelError, match="does not fit into fp16"):
        merge(run)
    assert weights(merge(run, dtype="bf16"))["model.layers.0.mlp.up_proj.weight"].max() > 9e4


def test_stored_reads_what_safetensors_writes(mini):
    found = stored.tensors(mini)
    for name, tensor in weights(mini).items():
        assert found[name].shape == tuple(tensor.shape)
        assert torch.equal(read.read_rows(found[name]), tensor)
        assert torch.equal(read.read_rows(found[name], 3, 7), tensor[3:7])
