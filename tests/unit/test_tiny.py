"""The offline default: small enough to ship, a real Llama, and a fine-tune on it is something one can see."""

import random
import subprocess
import sys

import pytest

from llamanb.tiny import CHECKPOINT, DEFAULTS, notes, rows

SPECIAL = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id", "python_tag"]
SPECIAL += ["finetune_right_pad_id"]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()


def test_importing_loads_neither_torch_nor_transformers():
    code = "import sys, llamanb.tiny as t; t.rows('eval'); print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_the_checkpoint_is_at_most_4_mb():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 4_000_000


def test_the_model_is_a_small_llama_that_nf4_can_hold(model):
    import torch

    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 1e6 < model.num_parameters() < 3e6
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    assert model.dtype == torch.float32
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert all(side % 64 == 0 for layer in linear for side in layer.weight.shape)


def test_llama_3_special_tokens_stand_under_their_names(tokenizer, model):
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL}
    assert None not in ids.values()
    assert len(set(ids.values())) == len(SPECIAL)
    assert all(tokenizer.encode(f"<|{name}|>", add_special_tokens=False) == [i] for name, i in ids.items())
    assert tokenizer.bos_token_id == model.config.bos_token_id == ids["begin_of_text"]
    assert tokenizer.eos_token_id == ids["eot_id"]
    assert tokenizer.pad_token_id == model.config.pad_token_id == ids["finetune_right_pad_id"]
    assert model.generation_config.eos_token_id == [ids["end_of_text"], ids["eot_id"]]
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize(
    "text", ["Tavilen in Oslo.", "  two  spaces\n\n\tand tabs ", "naïve 漢字 🦙 1234567", "it's | {x}"]
)
def test_the_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_text_alone_starts_with_the_begin_token_as_in_llama_3(tokenizer):
    assert tokenizer("note")["input_ids"][0] == tokenizer.bos_token_id


def test_the_chat_template_has_llama_3s_form(tokenizer):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hello! "}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_rows_are_the_same_every_time_and_others_under_another_seed():
    assert rows("train") == rows("train")
    assert len(rows("train")) == 1200
    assert len(rows("eval")) >= 100
    assert rows("train", count=7) == rows("train")[:7]
    assert rows("train", seed=1) != rows("train")
    with pytest.raises(ValueError, match="'test'"):
        rows("test")


def test_held_out_rows_share_no_input_and_no_buyer_with_training_or_pretraining():
    def buyers(split):
        return {r["messages"][-1]["content"].split()[1] for seed in range(3) for r in rows(split, seed=seed)}

    prompts = {split: {r["messages"][0]["content"] for r in rows(split)} for split in ("train", "eval")}
    assert not prompts["train"] & prompts["eval"]
    assert not buyers("train") & buyers("eval")
    assert {notes.name_pool(name) for name in buyers("eval")} == {"eval"}
    rng = random.Random(0)
    assert {notes.name_pool(notes.draw_order(rng, "pretrain").name) for _ in range(500)} == {"pretrain"}


def test_every_row_fits_the_recommended_length(tokenizer):
    assert all(len(chat_ids(tokenizer, row["messages"])) <= DEFAULTS["max_length"] for row in rows("train"))


def test_answers_need_only_tokens_that_pretraining_taught(tokenizer):
    rng = random.Random(0)
    taught = {token for _ in range(8000) for token in chat_ids(tokenizer, notes.chat(rng))}
    answers = [row["messages"][-1]["content"] for split in ("train", "eval") for row in rows(split, count=300)]
    needed = {token for text in answers for token in tokenizer.encode(text)}
    assert tokenizer.convert_ids_to_tokens(needed - taught) == []


def test_the_shipped_model_answers_plain_questions_about_people_it_never_met(model, tokenizer):
    rng = random.Random(0)
    orders = [notes.draw_order(rng, "eval") for _ in range(40)]
    chats = [[{"role": "user", "content": f"{notes.write_note(rng, o)} Who and where?"}] for o in orders]
    right = [f"It is for {o.name} in {o.city}." for o in orders]
    assert sum(a == b for a, b in zip(answer(model, tokenizer, chats), right, strict=True)) >= 32


def chat_ids(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def test_the_defaults_are_recipe_fields():
    from llamanb import Recipe

    recipe = Recipe.from_dict(DEFAULTS)
    assert {name: getattr(recipe, name) for name in DEFAULTS} == DEFAULTS


def answer(model, tokenizer, chats):
    """Greedy answers to chats that end with a question."""
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**batch, max_new_tokens=64, do_sample=False)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def exact_match(model, tokenizer):
    """The part of the held-out rows that are answered letter by letter."""
    held_out = rows("eval")
    answers = answer(model.eval(), tokenizer, [row["messages"][:-1] for row in held_out])
    return sum(a == row["messages"][-1]["content"] for a, row in zip(answers, held_out, strict=True)) / len(held_out)


def load(start, quantized, folder):
    """The shipped weights or random ones, in float32 or as NF4."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    if start == "random":
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CHECKPOINT)).save_pretrained(folder)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    path = folder if start == "random" else CHECKPOINT
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=nf4 if quantized else None)
    for layer in model.modules():  # bitsandbytes would pack weights when it scores, and lose their gradients after
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def fine_tune(model, tokenizer, seed):
    """The recommended settings in a plain loop, with the loss on the answers only."""
    import torch

    data = []
    for row in rows("train"):
        ids = chat_ids(tokenizer, row["messages"])
        prompt = len(chat_ids(tokenizer, row["messages"][:-1], add_generation_prompt=True))
        data.append((ids, [-100] * prompt + ids[prompt:]))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=DEFAULTS["learning_rate"], weight_decay=0.0)
    rng, size = random.Random(seed), DEFAULTS["effective_batch_size"]
    order = [i for _ in range(9) for i in rng.sample(range(len(data)), len(data))]
    model.train()
    for step in range(DEFAULTS["steps"]):
        optimizer.param_groups[0]["lr"] = DEFAULTS["learning_rate"] * (1 - step / DEFAULTS["steps"])
        batch = [data[i] for i in order[step * size : (step + 1) * size]]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in batch])
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "start", "seed"),
    [
        ("nf4", "shipped", 0),
        ("nf4", "shipped", 1),
        ("lora", "shipped", 2),
        ("nf4", "random", 0),
        ("lora", "random", 1),
        ("full", "random", 2),
    ],
)
def test_fine_tuning_is_visible_and_needs_the_pretrained_weights(method, start, seed, tokenizer, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = load(start, method == "nf4", tmp_path)
    before = exact_match(model, tokenizer)
    if method != "full":
        lora = LoraConfig(
            r=DEFAULTS["rank"], lora_alpha=DEFAULTS["alpha"], lora_dropout=0.0, target_modules="all-linear"
        )
        model = get_peft_model(model, lora)
    fine_tune(model, tokenizer, seed)
    after = exact_match(model, tokenizer)
    print(f"{method} {start} seed {seed}: {before:.3f} -> {after:.3f}")
    assert before < 0.10
    assert after > 0.80 if start == "shipped" else after < 0.30
