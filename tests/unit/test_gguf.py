"""GGUF files, read back by transformers' own loader; and the tiny default from training to there."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import gguf
import jinja2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llamanb import Card, Recipe, load_adapter, load_data, merge, plan, tiny, to_gguf, train
from llamanb.architecture import from_config
from llamanb.data.encode import end_token_ids, load_tokenizer, render
from llamanb.errors import DiskFullError, ModelError, RecipeError
from llamanb.evaluate import evaluate
from llamanb.export import gguf_file, ollama
from llamanb.export.gguf_file import LLAMA3_SPLIT, rope_factors
from llamanb.generate import generate
from llamanb.tiny import CHECKPOINT, DEFAULTS

IDS = torch.arange(40, 90)[None]


def loaded(path, **options):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def fields(path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The tiny default, trained until it answers in its new format and stops."""
    recipe = Recipe(**{**DEFAULTS, "steps": 40}, eval_rows=16)
    data = load_data(recipe)
    return train(plan(recipe, Card("CPU", None)), data, name="run", runs=tmp_path_factory.mktemp("runs")), data


@pytest.fixture(scope="module")
def merged(run):
    return merge(run[0])


@pytest.mark.slow
def test_from_training_to_gguf_the_answers_stay(run, merged, capsys):
    """Adapter on its base, merged, and both kinds of GGUF: equal greedy tokens, that stop by themselves."""
    run, data = run
    model, tokenizer = load_adapter(run.folder)
    reloaded = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    f16, q8_0 = (loaded(to_gguf(merged, kind=kind)) for kind in ("f16", "q8_0"))
    for one in (f16, q8_0):
        one.generation_config.eos_token_id = end_token_ids(tokenizer)
    assert torch.equal(logits(f16), logits(reloaded)), "f16 holds what was merged"
    prompts = [render(tokenizer, e.messages[:1], prompt=True) for e in data.held_out_examples]
    answers = generate(model, tokenizer, prompts, 40)
    assert sum(len(answer.text.split("|")) == 5 for answer in answers) > 12, "it has learned its format"
    assert generate(reloaded, tokenizer, prompts, 40) == answers
    assert generate(f16, tokenizer, prompts, 40) == answers
    same = [a == b for a, b in zip(generate(q8_0, tokenizer, prompts, 40), answers, strict=True)]
    assert sum(same) >= len(same) - 2, "8 bits may tip a choice between two words"
    assert (logits(q8_0) - logits(f16)).abs().max() < 0.05 * logits(f16).abs().max()
    ids = tokenizer(prompts[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    ended = reloaded.generate(ids, max_new_tokens=60)[0]  # as its own generation_config.json says
    assert ended[-1] in end_token_ids(tokenizer)
    assert len(ended) < ids.shape[1] + 60
    with capsys.disabled():
        original = AutoModelForCausalLM.from_pretrained(merge(run, base="original"), dtype=torch.float32)
        losses = [evaluate(one, data).loss for one in (model, reloaded, original, q8_0)]
        print(
            "\nheld-out loss: adapter {:.4f}, merged trained {:.4f}, merged original {:.4f}, q8_0 {:.4f}".format(
                *losses
            )
        )
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


@pytest.mark.slow
def test_tokenizer_and_template_come_along(merged, capsys):
    path = to_gguf(merged)
    tokenizer, there = load_tokenizer(merged), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    written = fields(path)
    assert there.chat_template == tokenizer.chat_template == written["tokenizer.chat_template"]
    ids = tokenizer.get_vocab()
    for key, token in (
        ("bos", "<|begin_of_text|>"),
        ("eos", "<|eot_id|>"),
        ("eot", "<|eot_id|>"),
        ("eom", "<|eom_id|>"),
    ):
        assert written[f"tokenizer.ggml.{key}_token_id"] == ids[token]
    assert written["tokenizer.ggml.tokens"] == [token for token, _ in sorted(ids.items(), key=lambda item: item[1])]
    kinds = written["tokenizer.ggml.token_type"]
    assert {i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL} == set(tokenizer.all_special_ids) | {
        ids[token.content] for token in tokenizer.added_tokens_decoder.values()
    }
    assert "llama-quantize" in capsys.readouterr().out


def test_a_mini_llama_3_with_stretched_positions(mini, tmp_path, capsys):
    """Untied embeddings are in test_names; here the tensor that llama.cpp stretches positions by."""
    path = to_gguf(mini, tmp_path / "mini.gguf")
    config = AutoConfig.from_pretrained(mini)
    plain = AutoModelForCausalLM.from_pretrained(mini, dtype=torch.float16).float()
    # transformers' loader reads no rope_freqs, so it is told the config
    assert (logits(loaded(path, config=config)) - logits(plain)).abs().max() < 1e-5
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    factors = tensors["rope_freqs.weight"].data
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    usual = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert np.allclose(usual.numpy() / factors, scaled.numpy(), rtol=1e-6)
    assert {factors.min(), factors.max()} == {1.0, 8.0}, "short waves stay, long ones are stretched"


def test_llama_3_1_s_positions():
    """The published numbers of 8B: 64 factors, between them a few that are neither 1 nor 8."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_parameters=rope)
    factors = rope_factors(config.to_dict(), from_config(config.to_dict(), "8b"))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    usual = 5e5 ** -(torch.arange(0, 128, 2) / 128)
    assert np.allclose(usual.numpy() / factors, scaled.numpy(), rtol=1e-5)
    assert 0 < sum(1 < factor < 8 for factor in factors) < 20
    with pytest.raises(ModelError, match="'yarn'"):
        rope_factors({"rope_parameters": {"rope_type": "yarn"}}, None)


def test_names_shapes_and_an_untied_head(mini, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(mini, dtype=torch.float16)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    model.save_pretrained(tmp_path / "untied")
    load_tokenizer(mini).save_pretrained(tmp_path / "untied")
    path = to_gguf(tmp_path / "untied", tmp_path / "untied.gguf", kind="q8_0")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(found) == 2 * 9 + 4
    assert found["output.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert found["blk.1.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    head = gguf.dequantize(found["output.weight"].data, found["output.weight"].tensor_type)
    assert np.allclose(head, load_file(tmp_path / "untied" / "model.safetensors")["lm_head.weight"], atol=0.02)
    assert fields(path)["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    again = path.read_bytes()
    assert to_gguf(tmp_path / "untied", path, kind="q8_0").read_bytes() == again


def test_large_weights_pass_in_pieces(mini, tmp_path, monkeypatch):
    whole = [to_gguf(mini, tmp_path / "whole.gguf", kind=kind).read_bytes() for kind in ("f16", "q8_0")]
    monkeypatch.setattr("llamanb.export.read.AT_ONCE", 64 * 64)
    assert [to_gguf(mini, tmp_path / "whole.gguf", kind=kind).read_bytes() for kind in ("f16", "q8_0")] == whole


def test_more_rows_than_tokens_are_marked_unused(mini, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(mini)
    model.resize_token_embeddings(576)
    model.save_pretrained(tmp_path / "wide")
    load_tokenizer(mini).save_pretrained(tmp_path / "wide")
    written = fields(to_gguf(tmp_path / "wide"))
    assert len(written["tokenizer.ggml.tokens"]) == 576
    assert set(written["tokenizer.ggml.token_type"][512:]) == {gguf.TokenType.UNUSED}


def test_weights_too_large_for_f16_leave_nothing(mini, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(mini, dtype=torch.bfloat16)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = 1e5
    model.save_pretrained(tmp_path / "large")
    load_tokenizer(mini).save_pretrained(tmp_path / "large")
    with pytest.raises(ModelError, match="does not fit into f16"):
        to_gguf(tmp_path / "large", tmp_path / "out" / "large.gguf")
    assert not list((tmp_path / "out").iterdir())


def test_refused_before_anything_is_written(mini, tmp_path, monkeypatch):
    def refused(error, match, folder=mini, **options):
        with pytest.raises(error, match=match):
            to_gguf(folder, tmp_path / "out" / "no.gguf", **options)
        assert not (tmp_path / "out").exists()

    refused(RecipeError, "llama-quantize", kind="q4_k_m")
    refused(ModelError, "no readable config.json", tmp_path)
    bits = tmp_path / "bits"
    bits.mkdir()
    config = json.loads((mini / "config.json").read_text())
    stored = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    (bits / "config.json").write_text(json.dumps(config | stored))
    refused(ModelError, "merge it first", bits)
    monkeypatch.setattr(gguf_file, "free_bytes", lambda folder: 1000)
    refused(DiskFullError, "does not fit on its disk")


# --- how text is split before the merges

BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001
"""llama.cpp's `bloom`."""


def split_by(tokenizer, regex):
    """The tokenizer with another split; what the regex leaves out is a piece of its own, as in llama.cpp."""
    made = copy.deepcopy(tokenizer)
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return made


@pytest.mark.slow
def test_the_tiny_s_text_splits_alike_in_llama_cpp(merged):
    tokenizer = load_tokenizer(merged)
    assert fields(to_gguf(merged))["tokenizer.ggml.pre"] == "bloom"
    bloom, llama3 = split_by(tokenizer, BLOOM), split_by(tokenizer, LLAMA3_SPLIT)
    texts = [render(tokenizer, row["messages"]) for split in ("train", "eval") for row in tiny.rows(split)]
    assert [bloom.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert [llama3.encode(text) for text in texts] != [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize(("regex", "known"), [(LLAMA3_SPLIT, True), (r"\w+|\W+", False)])
def test_text_splits_as_llama_3_s_does(mini, tmp_path, capsys, regex, known):
    folder = shutil.copytree(mini, tmp_path / "model")
    saved = json.loads((folder / "tokenizer.json").read_text())
    model = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary, merges = (
        model.get_vocab(with_added_tokens=False),
        [("Ġ", "1"), ("1", "2"), ("(", "w"), ("Ċ", "Ċ"), ("'", "s")],
    )
    for pair, filler in zip(merges, [f"filler{i}" for i in range(len(merges))], strict=True):
        vocabulary["".join(pair)] = vocabulary.pop(filler, len(vocabulary))
    saved["model"] |= {"vocab": vocabulary, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = split_by(load_tokenizer(folder), regex)
    tokenizer.save_pretrained(folder)
    path = to_gguf(folder, tmp_path / "split.gguf")
    assert ("may give" not in capsys.readouterr().out) == known
    there = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "It's 12 (words)\n\n1212 \n it'S"
    same = there.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert same == known


# --- Ollama


def as_jinja(template: str) -> str:
    """The little of Go's template language that a Modelfile here has, as jinja."""
    opened, out = [], {"if .System": "if system", "range .Messages": "for m in messages", "else": "else"}

    def turned(match) -> str:
        code = match[1].strip()
        if code in (".System", ".Content"):
            return "{{ system }}" if code == ".System" else "{{ m.content }}"
        if code == "end":
            return f"{{% end{opened.pop()} %}}"
        role = re.fullmatch(r'(else )?if eq \.Role "(\w+)"', code)
        text = f"{'elif' if role[1] else 'if'} m.role == '{role[2]}'" if role else out[code]
        if text.startswith(("if", "for")):
            opened.append(text.split()[0])
        return f"{{% {text} %}}"

    return re.sub(r"\{\{(.*?)\}\}", turned, template)


@pytest.mark.parametrize("template", ["own", "llama3", "llama3_1", "llama3_2"])
def test_ollama_s_template_gives_what_the_tokenizer_s_does(tokenizer, trl_template, template):
    tokenizer = copy.deepcopy(tokenizer)
    if template != "own":
        tokenizer.chat_template = trl_template(template)
    text, remark = ollama.modelfile("mine.gguf", tokenizer)
    assert not remark
    assert 'PARAMETER stop "<|eot_id|>"' in text
    made = as_jinja(re.search(r'TEMPLATE """(.*)"""', text, re.DOTALL)[1])
    user, answer = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}
    for turns in ([user], [user, answer, user]):
        for system in ([], [{"role": "system", "content": "Be brief."}]):
            wanted = render(tokenizer, system + turns, prompt=True).removeprefix(tokenizer.bos_token)
            said = {"system": "Be brief." if system else "", "messages": system + turns}
            assert jinja2.Template(made, keep_trailing_newline=True).render(said) == wanted


def test_a_template_of_another_make_is_left_out(tokenizer):
    odd = SimpleNamespace(
        chat_template="x",
        bos_token="",
        eos_token="</s>",
        get_vocab=lambda: {"</s>": 1},
        apply_chat_template=lambda *a, **k: "x",
    )
    text, remark = ollama.modelfile("mine.gguf", odd)
    assert text == 'FROM ./mine.gguf\nPARAMETER stop "</s>"\n'
    assert "no TEMPLATE" in remark


def test_the_tiny_checkpoint_itself(tmp_path):
    path = to_gguf(CHECKPOINT, tmp_path / "tiny.gguf")
    there = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float16).float()
    assert torch.equal(logits(loaded(path)), logits(there))


@pytest.mark.parametrize("to", ["there", "Llama-3.2", "model.bin"])
def test_a_file_that_is_no_gguf_is_refused_before_anything_is_written(tmp_path, to):
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RecipeError, match=r"its name ends in \.gguf"):
        to_gguf(CHECKPOINT, tmp_path / to)
    (tmp_path / "a.gguf").mkdir()
    with pytest.raises(RecipeError, match="it is the file to write"):
        to_gguf(CHECKPOINT, tmp_path / "a.gguf")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "a.gguf"])
