"""What pruning takes away, against the whole model in memory; what it writes; and what it refuses."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamanb import Recipe, tiny
from llamanb.errors import DataError, DiskFullError, ModelError, RecipeError
from llamanb.recipe import LINEAR_LAYERS
from llamanb.shrink import walk, write, write_pruned
from llamanb.shrink.write import facts_of
from tests.checkpoints import make_checkpoint
from tests.shrunken import dense, fresh_logits, inputs_of, linear, logits, rows


@pytest.fixture
def prune(mini, tmp_path):
    def prune(name="out", **fields):
        fields = {"data": rows(), **fields}
        return write_pruned(Recipe(model=str(fields.pop("model", mini))), tmp_path / name, **fields)

    return prune


def pairs(folder, mini):
    """Each linear layer's weight before and after."""
    before, after = dense(mini), dense(folder)
    for old, new in zip(before.model.layers, after.model.layers, strict=True):
        for name in LINEAR_LAYERS:
            yield name, linear(old, name).weight.detach(), linear(new, name).weight.detach()


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.9])
@pytest.mark.parametrize("method", ["magnitude", "magnitude-global", "wanda"])
def test_as_many_weights_as_asked_are_zero_and_the_others_are_what_they_were(prune, mini, method, sparsity):
    folder = prune(method=method, sparsity=sparsity)
    zeros = total = 0
    for _, old, new in pairs(folder, mini):
        dropped = new == 0
        assert torch.equal(new[~dropped], old[~dropped])
        zeros, total = zeros + int(dropped.sum()), total + old.numel()
        if method == "magnitude":
            assert dropped.sum() == round(sparsity * old.numel())
        if method == "wanda":
            assert set(dropped.sum(1).tolist()) == {round(sparsity * old.shape[1])}
        if method != "wanda":
            assert old[dropped].abs().max() <= old[~dropped].abs().min()
    assert zeros / total == pytest.approx(sparsity, abs=1e-2 if method == "wanda" else 1e-3)
    assert facts_of(folder)["zeros"] == zeros / total


def test_globally_the_smallest_of_all_matrices_go(prune, tmp_path):
    """One layer's weights are ten times as large: it keeps nearly all of them."""
    base = make_checkpoint("mini", tmp_path / "uneven")
    model = dense(base)
    for name in LINEAR_LAYERS:
        linear(model.model.layers[1], name).weight.data *= 10
    model.save_pretrained(base)
    after = dense(prune(model=base, method="magnitude-global", sparsity=0.4))
    share = [(linear(layer, "up_proj").weight == 0).float().mean() for layer in after.model.layers]
    assert share[0] > 0.7
    assert share[1] < 0.1
    dropped = max(old[new == 0].abs().max() for _, old, new in pairs(tmp_path / "out", base))
    kept = min(new[new != 0].abs().min() for _, _, new in pairs(tmp_path / "out", base))
    assert dropped <= kept


def test_wanda_s_inputs_are_those_of_the_model_pruned_so_far(prune, mini):
    """Each layer is scored by size times input, inputs being what the layers pruned before it give."""
    folder, model, data = prune(method="wanda", sparsity=0.5), dense(mini), rows()
    after = dense(folder)
    for number, layer in enumerate(model.model.layers):
        for name in LINEAR_LAYERS:
            x = inputs_of(model, data, number, name)
            scores = linear(layer, name).weight.abs() * x.square().mean(0).sqrt()
            dropped = linear(after.model.layers[number], name).weight == 0
            worst_kept = scores.masked_fill(dropped, float("inf")).min(1).values
            best_dropped = scores.masked_fill(~dropped, 0).max(1).values
            assert (best_dropped <= worst_kept * 1.001).all(), (number, name)
        for name in LINEAR_LAYERS:
            linear(layer, name).weight = linear(after.model.layers[number], name).weight


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_two_of_four_in_a_row_are_left(prune, mini, method):
    for _, old, new in pairs(prune(method=method, pattern="2:4"), mini):
        fours = new.view(-1, 4)
        assert ((fours == 0).sum(1) == 2).all()
        if method == "magnitude":
            assert torch.equal(fours.abs().sum(1), old.view(-1, 4).abs().topk(2).values.sum(1))


def test_the_layer_that_changes_least_goes(prune, mini):
    model, data = dense(mini), rows()
    folder = prune(method="layers", sparsity=0.5)
    changes = [[], []]
    with torch.no_grad():
        for row in data.train:
            states = model.model(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
            last = model.model.layers[1](
                states[1], position_embeddings=model.model.rotary_emb(states[1], torch.arange(len(row.input_ids))[None])
            )
            for i, (x, y) in enumerate(((states[0], states[1]), (states[1], last))):
                changes[i] += (1 - torch.nn.functional.cosine_similarity(x[0], y[0], dim=-1)).tolist()
    influence = [sum(change) / len(change) for change in changes]
    facts = facts_of(folder)
    assert facts["influence"] == pytest.approx(influence, rel=1e-3)
    assert facts["kept"] == [max((0, 1), key=influence.__getitem__)]
    assert facts["calibration_tokens"] == len(changes[0])


@pytest.mark.parametrize("method", ["channels", "heads"])
def test_what_adds_least_to_the_output_goes(prune, mini, method):
    folder, model = prune(method=method, sparsity=0.5), dense(mini)
    name, size = {"channels": ("down_proj", 1), "heads": ("o_proj", 32)}[method]
    x, weight = inputs_of(model, rows(), 0, name), linear(model.model.layers[0], name).weight.detach()
    parts = zip(x.split(size, 1), weight.split(size, 1), strict=True)
    added = torch.stack([(part @ columns.T).square().sum() for part, columns in parts])
    wanted = added.topk(len(added) // 2).indices.sort().values.tolist()
    assert facts_of(folder)["kept"][0] == wanted


def cut_by_hand(model, facts: dict):
    """The dense model, with what the facts say taken out of it."""
    layers, kept = model.model.layers, facts["kept"]
    if facts["method"] == "layers":
        model.model.layers = torch.nn.ModuleList([layers[i] for i in kept])
        model.config.num_hidden_layers = len(kept)
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = i
        return model
    for layer, numbers in zip(layers, kept, strict=True):
        if facts["method"] == "channels":
            cuts = {"gate_proj": (0, numbers), "up_proj": (0, numbers), "down_proj": (1, numbers)}
        else:
            size = model.config.head_dim
            group = size * model.config.num_attention_heads // model.config.num_key_value_heads
            wide = [n * group + i for n in numbers for i in range(group)]
            narrow = [n * size + i for n in numbers for i in range(size)]
            cuts = {"q_proj": (0, wide), "k_proj": (0, narrow), "v_proj": (0, narrow), "o_proj": (1, wide)}
        for name, (side, at) in cuts.items():
            weight = linear(layer, name).weight
            linear(layer, name).weight = torch.nn.Parameter(weight.index_select(side, torch.tensor(at)))
    return model


@pytest.mark.slow
def test_a_fresh_process_loads_what_was_written_as_a_plain_llama(prune, tmp_path):
    """The tiny Llama, every structured method and an unstructured one, against the dense model cut by hand."""
    cuts = {"layers": 0.25, "channels": 0.4, "heads": 0.5}
    folders = {m: prune(m, model="tiny", method=m, sparsity=s, data=rows(vocabulary=1000)) for m, s in cuts.items()}
    for (method, folder), found in zip(folders.items(), fresh_logits(*folders.values()), strict=True):
        wanted = logits(cut_by_hand(dense(tiny.CHECKPOINT), facts_of(folder)))
        assert torch.allclose(found, wanted, atol=2e-4), method
        written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert written < 0.95 * (tiny.CHECKPOINT / "model.safetensors").stat().st_size
        assert facts_of(folder)["bytes"] == pytest.approx(written, rel=0.01)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert "license: apache-2.0" in (folder / "README.md").read_text()
        assert sum(p.numel() for p in model.parameters()) * 2 == facts_of(folder)["bytes"]


def test_what_a_try_left_that_was_cut_off_is_not_in_the_way(prune, tmp_path, monkeypatch):
    (tmp_path / "out.aside").mkdir()
    (tmp_path / "out.aside" / "model-00001-of-00009.safetensors").write_text("half")
    assert not [path for path in prune(method="magnitude").iterdir() if "of-00009" in path.name]
    monkeypatch.setattr(write.Output, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune("other", method="magnitude")
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity": 0}, "sparsity = 0 is not possible"),
        ({"sparsity": 1.0}, "between 0 and 1"),
        ({"sparsity": float("nan")}, "sparsity = nan"),
        ({"sparsity": "half"}, "sparsity = 'half'"),
        ({"method": "random"}, "one of magnitude, magnitude-global, wanda, layers"),
        ({"pattern": "2:4", "sparsity": 0.6}, "leaves half of each four"),
        ({"pattern": "4:8"}, "pattern = '4:8'"),
        ({"pattern": "2:4", "method": "channels"}, "method = 'channels'"),
        ({"pattern": "2:4", "method": "magnitude-global"}, "'magnitude' or 'wanda'"),
        ({"method": "layers", "sparsity": 0.1}, "of 2 2 would stay"),
        ({"method": "heads", "sparsity": 0.9}, "sparsity = 0.5"),
        ({"method": "channels", "sparsity": 0.9}, "sparsity = 0.5"),
    ],
)
def test_what_cannot_be_is_named_before_anything_is_written(prune, tmp_path, fields, words):
    with pytest.raises(RecipeError, match=words):
        prune(**fields)
    assert not list(tmp_path.iterdir())


def test_a_width_that_is_no_whole_number_of_fours(prune, tmp_path):
    base = make_checkpoint("mini", tmp_path / "odd", intermediate_size=130)
    with pytest.raises(RecipeError, match="down_proj is 130 wide"):
        prune(model=base, pattern="2:4")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_heads_that_the_hidden_size_rules_out(prune, tmp_path):
    """transformers' config takes only as many heads as divide the hidden size: 3 of 4 do not divide 64."""
    base = make_checkpoint("mini", tmp_path / "four", num_key_value_heads=4)
    with pytest.raises(RecipeError, match=r"hidden size 64 rules out[\s\S]*sparsity = 0.5 or 0.75"):
        prune(model=base, method="heads", sparsity=0.25)
    assert fresh_logits(prune(model=base, method="heads", sparsity=0.75))[0].isfinite().all()


@pytest.mark.parametrize("method", ["wanda", "layers", "channels", "heads"])
@pytest.mark.parametrize("missing", [{"data": None}, {"calibration_rows": 0}])
def test_calibration_rows_are_missing(prune, tmp_path, method, missing):
    with pytest.raises(DataError, match=r"calibration rows are missing[\s\S]*load_data"):
        prune(method=method, **missing)
    assert not list(tmp_path.iterdir())
    assert prune(method="magnitude", **missing).is_dir()  # needs none


def test_a_quantized_base_a_taken_folder_and_a_full_disk(prune, mini, tmp_path, monkeypatch):
    quantized = tmp_path / "quantized"
    make_checkpoint("mini", quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantized \(nf4\)[\s\S]*16-bit checkpoint"):
        prune(model=quantized)
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="is there already"):
        prune()
    (tmp_path / "out").rmdir()
    monkeypatch.setattr(write, "free_bytes", lambda _: 1000)
    with pytest.raises(DiskFullError, match="does not fit"):
        prune()
    assert not list(tmp_path.glob("out*"))


def test_biases_are_refused(prune, tmp_path):
    base = make_checkpoint("mini", tmp_path / "biased", attention_bias=True)
    with pytest.raises(ModelError, match="has biases"):
        prune(model=base)


def test_meta_s_licence_goes_along(prune, tmp_path):
    base = make_checkpoint("mini", tmp_path / "Llama-3.2-1B")
    folder = prune(model=base, method="magnitude")
    card = (folder / "README.md").read_text()
    assert "license: llama3.2" in card
    assert "Built with Llama. Under the licence of its base: Llama 3.2 Community License https://" in card
    assert (folder / "NOTICE").read_text().startswith("Llama 3.2 is licensed under the Llama 3.2 Community License")


def test_rows_of_uneven_length_count_as_if_each_went_alone(mini, monkeypatch):
    """Padding is in no statistic, and how rows are put together changes none."""
    data = rows()
    found = []
    for at_once in (1, 4096):
        monkeypatch.setattr(walk, "TOKENS_AT_ONCE", at_once)
        way = walk.Walk(walk.Checkpoint.open(str(mini)), Recipe(model=str(mini)), walk.calibration(data))
        way.advance(way.layer(0))
        found.append(way.measure(way.layer(1), products=True))
    for name in LINEAR_LAYERS:
        assert torch.allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)
