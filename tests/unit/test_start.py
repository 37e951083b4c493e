"""Adapters that start from leading directions or from what quantizing loses: right with their base, through training,
resuming, loading and merging."""

import json

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from llamanb import Recipe, load_adapter, load_data, merge, plan, shrink, tiny, train
from llamanb.data.encode import load_tokenizer
from llamanb.errors import ModelError, RecipeError
from llamanb.evaluate import evaluate
from llamanb.model import attach_adapters, load_model
from llamanb.recipe import LINEAR_LAYERS
from tests.shrunken import dense, linear, logits

SMALL = {"rank": 4, "alpha": 6.0, "max_length": 128}


def adapted(recipe: Recipe):
    return attach_adapters(load_model(plan(recipe), load_tokenizer(tiny.CHECKPOINT)), recipe).eval()


@pytest.mark.parametrize("fields", [{}, {"rslora": True, "targets": ("q_proj", "down_proj")}], ids=["all", "two"])
def test_leading_directions_move_from_the_base_into_the_adapter(mini, tmp_path, fields):
    recipe = Recipe(**SMALL, **fields, model=str(mini), method="lora")
    folder = shrink.write_start(recipe, tmp_path / "pissa")
    model, whole = adapted(recipe.replace(model=str(folder))), dense(mini)
    assert torch.allclose(logits(model), logits(whole), atol=1e-4)
    rest = dense(folder)
    assert (logits(rest) - logits(whole)).abs().max() > 0.05  # the base alone is another model
    for old, new in zip(whole.model.layers, rest.model.layers, strict=True):
        for name in LINEAR_LAYERS:
            before, after = (torch.linalg.svdvals(linear(layer, name).weight.detach()) for layer in (old, new))
            wanted = before[4:] if name in recipe.target_modules else before
            assert torch.allclose(after[: len(wanted)], wanted, rtol=0.06)  # as near as 16 rounds come


def test_what_quantizing_loses_is_where_the_adapter_starts(mini, tmp_path):
    whole, off = dense(mini), []
    for rank in (2, 8, 24):
        recipe = Recipe(**SMALL | {"rank": rank}, model=str(mini), method="qlora-nf4")
        folder = shrink.write_start(recipe, tmp_path / f"{rank}", kind="loftq")
        assert torch.equal(dense(folder).model.layers[1].mlp.up_proj.weight, whole.model.layers[1].mlp.up_proj.weight)
        model, off_here = adapted(recipe.replace(model=str(folder))), []
        for name, module in model.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                weight = whole.get_submodule(name).weight.detach()
                lost = weight - dequantize_module_weight(module.base_layer).float()
                left = lost - module.get_delta_weight("default").detach()
                best = torch.linalg.svdvals(lost)[rank:].square().sum().sqrt()
                assert left.norm() == pytest.approx(best.item(), rel=0.01)
                off_here.append((left.norm() / lost.norm()).item())
        off.append(sum(off_here) / len(off_here))
    assert 1 > off[0] > off[1] > off[2]
    assert off[2] < 0.6


def test_trained_resumed_loaded_and_merged(tmp_path):
    """As any adapter on any base, once the two are together."""
    recipe = Recipe(**tiny.DEFAULTS | {"steps": 2, "schedule": "constant", "effective_batch_size": 4}, method="lora")
    recipe = recipe.replace(warmup=0.0, eval_rows=8)
    folder = shrink.write_start(recipe, tmp_path / "start")
    recipe = recipe.replace(model=str(folder))
    data = load_data(recipe)
    run = train(plan(recipe), data, name="cut", runs=tmp_path)
    assert run.scores.before.loss == pytest.approx(evaluate(dense(tiny.CHECKPOINT), data).loss, rel=2e-3)
    assert run.scores.after.loss < run.scores.before.loss
    longer = recipe.replace(steps=4)
    resumed = train(plan(longer), data, name="cut", runs=tmp_path, resume=True)
    straight = train(plan(longer), data, name="straight", runs=tmp_path)
    ours, theirs = (load_file(one.saved / "adapter_model.safetensors") for one in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    loaded, _ = load_adapter(straight.folder)
    merged = LlamaForCausalLM.from_pretrained(merge(straight), dtype=torch.float32)
    assert evaluate(loaded, data).loss == pytest.approx(straight.scores.after.loss, rel=1e-4)
    assert torch.allclose(logits(merged), logits(loaded), atol=0.02)


def test_a_start_for_another_recipe_is_refused(mini, tmp_path):
    recipe = Recipe(**SMALL, model=str(mini), method="qlora-nf4")
    for kind, other in [
        ("pissa", {"rank": 8}),
        ("pissa", {"alpha": 4.0}),
        ("pissa", {"targets": "attention"}),
        ("pissa", {"dora": True}),
        ("loftq", {"method": "qlora-fp4"}),
        ("loftq", {"double_quant": False}),
    ]:
        folder = tmp_path / kind
        if not folder.exists():
            shrink.write_start(recipe, folder, kind=kind)
        with pytest.raises(ModelError, match=f"not for this recipe[\\s\\S]*{next(iter(other))} = "):
            adapted(recipe.replace(model=str(folder), **other))
    adapted(recipe.replace(model=str(tmp_path / "pissa"), method="lora"))  # quantized or not
    facts = json.loads((tmp_path / "pissa" / "start" / "start.json").read_text())
    (tmp_path / "pissa" / "start" / "start.json").write_text(json.dumps(facts["recipe"]))
    with pytest.raises(ModelError, match="cannot be read"):
        adapted(recipe.replace(model=str(tmp_path / "pissa")))
    (tmp_path / "loftq" / "start" / "adapter.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match=r"cannot be read[\s\S]*write_start"):
        adapted(recipe.replace(model=str(tmp_path / "loftq")))


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({}, "zeros", "one of pissa, loftq"),
        ({"method": "lora"}, "loftq", "nothing is lost"),
        ({"method": "full"}, "pissa", "there are no adapters"),
        ({"dora": True}, "pissa", "dora = False"),
        ({"rank": 33}, "pissa", "full rank of k_proj is 32"),
    ],
)
def test_what_cannot_be_is_named_before_anything_is_written(mini, tmp_path, fields, kind, words):
    with pytest.raises(RecipeError, match=words):
        shrink.write_start(Recipe(**SMALL | fields, model=str(mini)), tmp_path / "out", kind=kind)
    assert not list(tmp_path.iterdir())
