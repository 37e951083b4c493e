"""Makes the shipped checkpoint: trains the tokenizer, then pretrains the tiny Llama on chats about notes.

    python -m llamanb.tiny.make [--out FOLDER]

A plain torch loop on the CPU: 1,000 steps, about six minutes on two free cores (torch 2.13.0, transformers 5.23.0,
tokenizers 0.23.3). The shipped checkpoint is seed 0 with two threads; another machine or thread count sums in another
order and gives other weights of the same kind. The loss falls to 0.12, most of it the random strings to repeat.

Some 320 of the 1,024 tokens never occur in the chats: bytes outside ASCII, and merges that are only steps to longer
ones ("omer" on the way to " customer"). Their embeddings learn nothing, and LoRA leaves the embedding as it is: an
answer that needs one keeps a loss of some 3 nats there. So the ticket says "buyer"; a test holds its words to tokens
that occur.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llamanb.tiny import CHECKPOINT, notes

VOCAB_SIZE = 1024
STEPS = 1000
BATCH_SIZE = 16
LEARNING_RATE = 4e-3
WARMUP_STEPS = 50
DECAY_PART = 0.4
"""The last part of the steps, over which the learning rate falls to zero in a straight line."""

BOS, END_OF_TEXT, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
PAD = "<|finetune_right_pad_id|>"
SPECIAL_TOKENS = [BOS, END_OF_TEXT, PAD, "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", END_OF_TURN]
SPECIAL_TOKENS += ["<|python_tag|>"]

# A word or a number takes the space before it along: a fact is the same tokens wherever it stands in a sentence.
_WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

# Llama 3's format: each turn under a header, closed by the end-of-turn token.
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from 4,000 pretraining chats; the special tokens stand after its tokens, as they do in
    Llama 3's vocabulary."""
    rng = random.Random(f"tokenizer {seed}")
    # In the chat format a role and two line breaks stand before each message; both should be one token.
    texts = (f"{m['role']}\n\n{m['content']}" for _ in range(4000) for m in notes.chat(rng))
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(SPECIAL_TOKENS)
    # Like Llama 3's: text alone is given its begin token too.
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of 1.8 M random weights; the sides of its linear layers are multiples of 64, the block size of NF4."""
    end_of_text, end_of_turn = tokenizer.convert_tokens_to_ids([END_OF_TEXT, END_OF_TURN])
    begin_and_pad = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        eos_token_id=end_of_turn,
        **begin_and_pad,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    ends = [end_of_text, end_of_turn]
    model.generation_config = GenerationConfig(eos_token_id=ends, do_sample=False, **begin_and_pad)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Token ids of a chat, and labels: the answers with their end-of-turn token, -100 elsewhere."""
    ids, labels = [tokenizer.bos_token_id], [-100]
    for message in messages:
        head = tokenizer.encode(f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", add_special_tokens=False)
        body = tokenizer.encode(message["content"] + END_OF_TURN, add_special_tokens=False)
        ids += head + body
        labels += [-100] * len(head) + (body if message["role"] == "assistant" else [-100] * len(body))
    return ids, labels


def make_batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int) -> dict[str, torch.Tensor]:
    """Fresh chats, padded on the right: under causal attention no token sees the padding, so it needs no mask."""
    pairs = [encode(tokenizer, notes.chat(rng)) for _ in range(size)]
    length = max(len(ids) for ids, _ in pairs)
    return {
        "input_ids": torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in pairs]),
        "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in pairs]),
    }


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, steps: int, seed: int) -> None:
    """Trains all weights: Muon for the matrices (it learns to copy in half of AdamW's steps), AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    rng = random.Random(f"pretrain {seed}")
    model.train()
    start, recent = time.monotonic(), []
    for step in range(1, steps + 1):
        scale = min(1.0, step / WARMUP_STEPS, (1 - step / (steps + 1)) / DECAY_PART)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * scale
        loss = model(**make_batch(tokenizer, rng, BATCH_SIZE), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        if step % 50 == 0 or step == steps:
            loss, spent_s = sum(recent) / len(recent), time.monotonic() - start
            print(f"step {step:5d}  loss {loss:.4f}  {spent_s:4.0f} s", flush=True)
            recent.clear()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights as fp16 to stay small; the config says float32, so loading widens them to what a CPU trains in."""
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the tiny Llama's checkpoint.")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder to write to")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer, args.seed)
    print(f"{model.num_parameters():,} parameters")
    pretrain(model, tokenizer, steps=args.steps, seed=args.seed)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
