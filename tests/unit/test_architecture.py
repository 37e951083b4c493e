"""Architectures: published totals, transformers' own count, names that need no network, and configs that cannot be."""

import json
import subprocess
import sys

import pytest

from llamanb import hub, tiny
from llamanb.architecture import architecture, from_config, known
from llamanb.errors import ModelError
from llamanb.recipe import LINEAR_LAYERS

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError(f"asked the Hub for {args}")

    monkeypatch.setattr(hub, "checkpoint_folder", refuse)


@pytest.mark.parametrize(
    ("model", "parameters", "positions"),
    [  # the totals that the Hub shows on each model's page
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248, 8192),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, 131072),
        ("meta-llama/Meta-Llama-3.1-8B", 8_030_261_248, 131072),
        ("meta-llama/Meta-Llama-3-70B-Instruct", 70_553_706_496, 8192),
        ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496, 131072),
        ("meta-llama/Llama-3.1-405B", 405_853_388_800, 131072),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400, 131072),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, 131072),
    ],
)
def test_the_family_by_name_has_its_published_number_of_parameters(model, parameters, positions):
    found = architecture(model)
    assert (found.name, found.parameters, found.max_positions) == (model, parameters, positions)
    assert found.quantization is None


@pytest.mark.parametrize("mirror", hub.MIRRORS.values())
def test_mirrors_and_their_four_bit_copies_are_known(mirror):
    gated = next(name for name, copy in hub.MIRRORS.items() if copy == mirror)
    copy, four_bits = architecture(mirror), architecture(f"{mirror}-bnb-4bit")
    assert copy.parameters == four_bits.parameters == architecture(gated).parameters
    assert (copy.quantization, four_bits.quantization) == (None, "nf4")


@pytest.mark.parametrize(
    "name", ["unsloth/llama-3-8b-Instruct-bnb-4bit", "NousResearch/Meta-Llama-3.1-8B", "META-LLAMA/llama-3.2-1b"]
)
def test_spelling_does_not_matter(name):
    assert known(name).layers in (16, 32)


@pytest.mark.parametrize(
    "name",
    [
        "someone/Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B-Chinese",
        "meta-llama/My-Llama-3.1-8B",
        "meta-llama/Llama-3.1-405B-FP8",
        "meta-llama/Llama-3.1-8B-bnb-4bit",
        "unsloth/Llama-3.2-1B-unsloth-bnb-4bit",
        "unsloth/Llama-3.2-11B-Vision",
        "unsloth/Llama-3.1-9B",
        "Llama-3.1-8B",
        "",
    ],
)
def test_other_names_read_their_own_config(name, monkeypatch, tmp_path):
    assert known(name) is None
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(hub, "checkpoint_folder", lambda *asked, weights: tmp_path)
    assert architecture(name or "x/y").hidden == 64


def test_another_revision_reads_its_own_config(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    asked = []
    monkeypatch.setattr(hub, "checkpoint_folder", lambda *what, weights: asked.append((*what, weights)) or tmp_path)
    assert architecture("meta-llama/Llama-3.2-1B", "pruned").hidden == 64
    assert asked == [("meta-llama/Llama-3.2-1B", "pruned", False)]


def test_tiny_and_folders_read_their_own_config(tmp_path):
    assert architecture("tiny").layers == 4
    assert architecture(str(tiny.CHECKPOINT)).parameters == architecture("tiny").parameters
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = architecture(str(tmp_path))
    assert (found.head_size, found.q, found.kv, found.tied) == (16, 64, 32, True)


def test_a_layers_linear_shapes():
    llama = architecture("meta-llama/Llama-3.1-8B")
    assert {name: llama.linear(name) for name in LINEAR_LAYERS} == {
        "q_proj": (4096, 4096),
        "k_proj": (4096, 1024),
        "v_proj": (4096, 1024),
        "o_proj": (4096, 4096),
        "gate_proj": (4096, 14336),
        "up_proj": (4096, 14336),
        "down_proj": (14336, 4096),
    }
    assert llama.layer_linear_parameters == 218_103_808
    assert llama.layer_parameters == 218_103_808 + 2 * 4096
    assert llama.embedding_parameters == 128256 * 4096


@pytest.mark.parametrize("model", ["tiny", "meta-llama/Llama-3.2-1B"])
def test_transformers_counts_the_same(model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ours = architecture(model)
    config = transformers.LlamaConfig(
        hidden_size=ours.hidden,
        num_hidden_layers=ours.layers,
        num_attention_heads=ours.heads,
        num_key_value_heads=ours.kv_heads,
        head_dim=ours.head_size,
        intermediate_size=ours.intermediate,
        vocab_size=ours.vocabulary,
        tie_word_embeddings=ours.tied,
    )
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == ours.parameters
    layer = theirs.model.layers[0]
    assert sum(parameter.numel() for parameter in layer.parameters()) == ours.layer_parameters
    linear = {
        name.split(".")[-1]: (m.in_features, m.out_features) for name, m in layer.named_modules() if "proj" in name
    }
    assert linear == {name: ours.linear(name) for name in LINEAR_LAYERS}


def test_old_configs_leave_out_what_has_a_default():
    fields = {key: CONFIG[key] for key in CONFIG if key not in ("num_key_value_heads", "tie_word_embeddings")}
    fields |= {"max_position_embeddings": None, "hidden_size": 64.0}
    found = from_config(fields, "old")
    assert (found.kv_heads, found.tied, found.max_positions, found.hidden) == (4, False, 2048, 64)
    assert from_config(CONFIG | {"head_dim": 24, "hidden_size": 70}, "wide heads").q == 96


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [
        (None, None),
        ({}, None),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "int8"),
    ],
)
def test_what_a_checkpoint_already_is(quantization, kind):
    assert from_config(CONFIG | {"quantization_config": quantization}, "x").quantization == kind


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mistral"}, "'mistral' model, not a Llama"),
        ({"model_type": "llama4"}, "not a Llama"),
        ({"model_type": None}, "no model_type"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"vision_config": {"hidden_size": 8}}, "vision_config"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": float("nan")}, "hidden_size is 'nan'"),
        ({"hidden_size": float("inf")}, "hidden_size is 'inf'"),
        ({"hidden_size": -64}, "hidden_size is '-64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is '0'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is '2.5'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is 'True'"),
        ({"num_hidden_layers": 1025}, "a whole number from 1 to 1,024"),
        ({"vocab_size": "1000"}, "vocab_size is '1000'"),
        ({"vocab_size": 10**30}, "vocab_size is '1000000000"),
        ({"intermediate_size": [1]}, "intermediate_size"),
        ({"head_dim": 0}, "head_dim is '0'"),
        ({"hidden_size": 66}, "not divided by its 4 heads"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"num_key_value_heads": 8}, "4 heads cannot share 8"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"quantization_config": "nf4"}, "quantization_config is not an object"),
        ({"quantization_config": {"quant_method": "gptq"}}, "stored as 'gptq'"),
    ],
)
def test_a_config_that_cannot_be(changes, said):
    with pytest.raises(ModelError) as caught:
        from_config(CONFIG | changes, "them/theirs")
    assert said in str(caught.value)
    assert "them/theirs" in caught.value.what
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3", '"llama"', "[" * 100_000, b"\xff\xfe"])
def test_a_file_that_is_no_config(text, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        architecture(str(tmp_path))
    assert caught.value.fix


def test_it_loads_in_no_time_and_neither_torch_nor_the_hub():
    code = """
import sys, time
import llamanb
start = time.perf_counter()
from llamanb.architecture import architecture
architecture("meta-llama/Llama-3.1-8B"), architecture("tiny")
print(time.perf_counter() - start < 0.5, {"torch", "transformers", "huggingface_hub"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True set()\n", done.stderr
