"""Scores on held-out rows: loss over the trained tokens, and whether the generated answers are right."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llamanb.data import TrainingData
from llamanb.data.encode import IGNORE, Encoded, end_token_ids, render
from llamanb.html import Table

ROWS_AT_ONCE = 16
TOKENS_AT_ONCE = 4096
"""Rows at once are fewer where they are long, so that scoring takes no more than training does."""
POSITIONS_AT_ONCE = 1024
"""Positions whose logits are held at once: 0.5 GiB in fp32 with Llama 3's vocabulary."""
LONGEST_ANSWER = 256
"""Generated tokens at most, so that a model that never stops does not hold up the score."""


@dataclass(frozen=True)
class Scores:
    """What a model does on the held-out rows."""

    loss: float
    """Cross entropy per trained token, in nats."""
    exact_match: float | None
    """Share of generated answers that equal a reference but for white space; None where rows are plain text."""
    answers: tuple[str, ...]
    """Generated answers, in the order of the rows."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Comparison:
    """Scores before and after, on the same held-out rows. Prints as a table and shows as one in a notebook."""

    before: Scores
    after: Scores
    questions: tuple[str, ...]
    references: tuple[str, ...]
    shown: int = 3
    """How many rows are shown in full."""

    def tables(self) -> list[Table]:
        before, after = self.before, self.after
        rows = [
            ("loss per token", f"{before.loss:.3f}", f"{after.loss:.3f}"),
            ("perplexity", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}"),
        ]
        if before.exact_match is not None:
            rows.append(("exact match", f"{before.exact_match:.0%}", f"{after.exact_match:.0%}"))
        count = len(self.questions) or "no"
        samples = list(zip(self.questions, before.answers, after.answers, self.references, strict=False))[: self.shown]
        tables = [Table(["held-out rows", "before", "after"], rows, f"{count} rows that training never saw")]
        if samples:
            tables.append(Table(["question", "before", "after", "right answer"], samples))
        return tables

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables())


def evaluate(model, data: TrainingData) -> Scores:
    """Scores the model as it is now on the held-out rows; leaves its mode and its random state as they were."""
    import torch

    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        loss = _loss(model, data)
        answers = _answers(model, data)
    model.train(was_training)
    hits = [
        _same(answer, example.references)
        for answer, example in zip(answers, data.held_out_examples, strict=False)
        if example.references
    ]
    return Scores(loss, sum(hits) / len(hits) if hits else None, tuple(answers))


def compare(before: Scores, after: Scores, data: TrainingData) -> Comparison:
    examples = data.held_out_examples
    questions = tuple((e.messages[_prompt_length(e) - 1]["content"] if e.messages else e.text) for e in examples)
    return Comparison(before, after, questions, tuple((e.references or ("",))[0] for e in examples))


def _same(answer: str, references: tuple[str, ...]) -> bool:
    return any(" ".join(answer.split()) == " ".join(reference.split()) for reference in references)


def _prompt_length(example) -> int:
    """Messages before the last assistant turn, which is the one to be generated."""
    return max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")


def _loss(model, data: TrainingData) -> float:
    """Mean over every trained token of every row, whatever batch it stands in."""
    import torch

    from llamanb.attempts import in_halves

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = core.get_output_embeddings()

    def summed(rows: list[Encoded]) -> tuple[float, int]:
        total, count = 0.0, 0
        ids, mask, labels = (tensor.to(model.device) for tensor in _padded(rows, data.tokenizer.pad_token_id))
        hidden = core.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != IGNORE
        states, targets = hidden[wanted], labels[:, 1:][wanted]
        for part, target in zip(states.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True):
            logits = head(part.to(head.weight.dtype)).float()
            total += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
            count += len(target)
        return total, count

    batches = _batches(data.held_out, lambda row: len(row.input_ids))
    parts = [part for rows in batches for part in in_halves(summed, rows)]
    return sum(total for total, _ in parts) / sum(count for _, count in parts)


def answer(model, tokenizer, question: str, *, max_new_tokens: int = LONGEST_ANSWER) -> str:
    """The model's greedy answer to one question, asked in the chat format it was trained on."""
    prompt = render(tokenizer, [{"role": "user", "content": question}], prompt=True)
    return _generate(model, tokenizer, [prompt], max_new_tokens)[0]


def _answers(model, data: TrainingData) -> list[str]:
    """Greedy answers to the held-out prompts, in the rows' order; none where the rows are plain text."""
    from llamanb.attempts import in_halves

    tokenizer = data.tokenizer
    examples = [example for example in data.held_out_examples if example.messages]
    prompts = [render(tokenizer, e.messages[: _prompt_length(e)], e.tools, prompt=True) for e in examples]
    longest = max((len(tokenizer(text)["input_ids"]) for e in examples for text in e.references), default=0)
    most, answers = min(longest + 16, LONGEST_ANSWER), [""] * len(prompts)
    sizes = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    order = sorted(range(len(prompts)), key=sizes.__getitem__)  # like lengths together: little padding
    for batch in _batches(order, sizes.__getitem__):
        parts = in_halves(lambda texts: _generate(model, tokenizer, texts, most), [prompts[i] for i in batch])
        for i, text in zip(batch, itertools.chain(*parts), strict=True):
            answers[i] = text
    return answers


def _generate(model, tokenizer, prompts: list[str], max_new_tokens: int) -> list[str]:
    import torch

    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(
            **inputs.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            use_cache=True,
            eos_token_id=end_token_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _batches(items: list, size: Callable[..., int]) -> Iterator[list]:
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


def _padded(rows: list[Encoded], pad_id: int):
    """(ids, mask, labels), each (rows, longest row), padded on the right."""
    import torch

    width = max(len(row.input_ids) for row in rows)
    ids = [row.input_ids + [pad_id] * (width - len(row.input_ids)) for row in rows]
    labels = [row.labels + [IGNORE] * (width - len(row.labels)) for row in rows]
    mask = [[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)
