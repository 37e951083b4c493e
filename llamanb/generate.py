"""Text from a model: batches of prompts that fit the card, each answer up to where the model ends its turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llamanb.data.encode import end_token_ids, render

ROWS_AT_ONCE = 16
TOKENS_AT_ONCE = 4096
"""Of the prompts and what may follow, padded. Rows at once are fewer where they are long: 0.5 GiB of keys and values
with an 8B, and more for a single row that is longer."""
LONGEST_ANSWER = 256
"""Generated tokens at most, so that a model that never stops does not hold up what waits for it."""


class Answer(NamedTuple):
    text: str
    ended: bool
    """By itself, with an end token, and not because it became too long."""


def generate(
    model, tokenizer, prompts: list[str], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
) -> list[Answer]:
    """What follows each of the prompts, in their order. Leaves the model's mode and the random states as they were.

    Args:
        model: one that generates, as `load_adapter` returns.
        prompts: rendered, with their begin token.
        max_new_tokens: of each answer.
        temperature: 0 takes the likeliest token each time; above it, tokens are drawn.
        seed: of what is drawn.

    Where memory is not enough for a batch, its halves are done one after the other.
    """
    import torch

    from llamanb.attempts import in_halves

    was_training, answers = model.training, {}
    model.eval()
    sizes = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) + max_new_tokens for prompt in prompts]
    order = sorted(range(len(prompts)), key=sizes.__getitem__)  # like lengths together: little padding
    with torch.no_grad(), torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch in batches(order, sizes.__getitem__):
            texts = [prompts[i] for i in batch]
            parts = in_halves(lambda texts: _together(model, tokenizer, texts, max_new_tokens, temperature), texts)
            answers.update(zip(batch, itertools.chain(*parts), strict=True))
    model.train(was_training)
    return [answers[i] for i in range(len(prompts))]


def answer(model, tokenizer, question: str, *, max_new_tokens: int = LONGEST_ANSWER) -> str:
    """The model's greedy answer to one question, asked in the chat format it was trained on."""
    return generate(model, tokenizer, [asked(tokenizer, question)], max_new_tokens)[0].text


def settings(tokenizer, max_new_tokens: int, temperature: float) -> dict:
    """Of transformers' `generate`, whatever the checkpoint's own generation_config.json says."""
    drawn = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    ends = {"eos_token_id": end_token_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return {"max_new_tokens": max_new_tokens, "use_cache": True, **ends, **(drawn if temperature else greedy)}


def asked(tokenizer, question: str) -> str:
    return render(tokenizer, [{"role": "user", "content": question}], prompt=True)


def _together(model, tokenizer, prompts: list[str], max_new_tokens: int, temperature: float) -> list[Answer]:
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(**inputs.to(model.device), **settings(tokenizer, max_new_tokens, temperature))
    new, ends = output[:, inputs["input_ids"].shape[1] :], set(end_token_ids(tokenizer))
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [Answer(text.strip(), not ends.isdisjoint(row)) for text, row in zip(texts, new.tolist(), strict=True)]


def batches(items: list, size: Callable[..., int]) -> Iterator[list]:
    """Runs of at most ROWS_AT_ONCE items and, padded to the longest, TOKENS_AT_ONCE tokens (one item at least)."""
    batch: list = []
    for item in items:
        longest = max(size(i) for i in [*batch, item])
        if batch and (len(batch) == ROWS_AT_ONCE or longest * (len(batch) + 1) > TOKENS_AT_ONCE):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
