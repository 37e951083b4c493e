"""Scores on held-out rows: loss over the trained tokens, and whether the generated answers are right."""

from __future__ import annotations

import itertools

from llamanb.data import TrainingData
from llamanb.data.encode import IGNORE, Encoded, render
from llamanb.data.formats import SQUAD, UNANSWERABLE, Example
from llamanb.generate import LONGEST_ANSWER, ROWS_AT_ONCE, batches, generate
from llamanb.scores import Comparison, RowScore, Scores

LONGEST_PROMPT = 16384
"""Tokens of a prompt that is still answered, 2 GiB of keys and values with an 8B; and characters of plain text that is
gone on with."""
POSITIONS_AT_ONCE = 1024
"""Positions whose logits are held at once: 0.5 GiB in fp32 with Llama 3's vocabulary."""
CONTINUED, CONTINUATION = 3, 64
"""Rows of plain text that are gone on with after their first half, so that there is something to read, and by how many
tokens."""


def evaluate(model, data: TrainingData) -> Scores:
    """Scores the model as it is now on the held-out rows; leaves its mode and its random state as they were."""
    import torch

    was_training = model.training
    model.eval()
    with torch.no_grad():
        losses = _losses(model, data)
    model.train(was_training)
    is_squad, answers = data.format == SQUAD, _answers(model, data)
    rows = []
    for (nats, tokens), found, example in zip(losses, answers, data.held_out_examples, strict=True):
        text, ended = found or ("", None)
        exact, f1 = _right(text, example.references, is_squad) if found and example.references else (None, None)
        rows.append(RowScore(nats, tokens, text, ended, exact, f1))
    return Scores(tuple(rows))


def compare(before: Scores, after: Scores, data: TrainingData) -> Comparison:
    questions, references = [], []
    for example in data.held_out_examples:
        if example.messages:
            questions.append(example.messages[_prompt_length(example) - 1]["content"])
            references.append((example.references or ("",))[0])
        else:
            first = _first_half(example.text)
            questions.append(first)
            references.append(example.text[len(first) :].strip())
    return Comparison(before, after, tuple(questions), tuple(references))


def squad_scores(answer: str, references: tuple[str, ...]) -> tuple[bool, float]:
    """Exact match and F1 (0 to 1) as SQuAD's own script counts them (Rajpurkar et al. 2016, 2018): but for case,
    punctuation, articles and white space, the best of the references. What has no answer has the empty one."""
    from torchmetrics.functional.text import squad

    answer, *texts = ["" if _is(text, UNANSWERABLE) else text for text in (answer, *references)]
    asked = {"answers": {"text": texts, "answer_start": [0] * len(texts)}, "id": ""}
    found = squad({"prediction_text": answer, "id": ""}, asked)
    return bool(found["exact_match"]), found["f1"].item() / 100


def _right(answer: str, references: tuple[str, ...], is_squad: bool) -> tuple[bool, float | None]:
    if is_squad:
        return squad_scores(answer, references)
    return any(answer.split() == reference.split() for reference in references), None


def _is(text: str, word: str) -> bool:
    return text.strip(" .\"'\n").lower() == word


def _prompt_length(example: Example) -> int:
    """Messages before the last assistant turn that is learned, which is the one to be generated."""
    return max(i for i, m in enumerate(example.messages) if m["role"] == "assistant" and m.get("weight") != 0)


def _first_half(text: str) -> str:
    """Up to the space that is nearest to the middle from below, or the middle."""
    middle = (len(text) + 1) // 2
    return text[: text.rfind(" ", 1, middle)] if " " in text[1:middle] else text[:middle]


def _losses(model, data: TrainingData) -> list[tuple[float, int]]:
    """Of each held-out row, the summed cross entropy of its trained tokens, in nats, and their number."""
    import torch

    from llamanb.attempts import in_halves

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = core.get_output_embeddings()

    def summed(rows: list[Encoded]) -> list[tuple[float, int]]:
        ids, mask, labels = (tensor.to(model.device) for tensor in _padded(rows, data.tokenizer.pad_token_id))
        hidden = core.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != IGNORE
        states, targets = hidden[wanted].split(POSITIONS_AT_ONCE), labels[:, 1:][wanted].split(POSITIONS_AT_ONCE)
        nats = [
            torch.nn.functional.cross_entropy(head(part.to(head.weight.dtype)).float(), target, reduction="none")
            for part, target in zip(states, targets, strict=True)
        ]
        counts = wanted.sum(dim=1).tolist()  # summed on the host: in the same order each time
        return [(row.sum().item(), len(row)) for row in torch.cat(nats).cpu().double().split(counts)]

    found = (in_halves(summed, rows) for rows in batches(data.held_out, lambda row: len(row.input_ids)))
    return [row for parts in found for part in parts for row in part]


def _answers(model, data: TrainingData) -> list[tuple[str, bool | None] | None]:
    """Greedy answers to the held-out prompts, in the rows' order, each with whether it ended by itself. The first rows
    of plain text are gone on with; where those end says nothing. With streamed weights there is one batch of rows. A
    row whose answer begins after `max_length`, or far away, has none."""
    tokenizer, examples = data.tokenizer, data.held_out_examples
    chats = [i for i, example in enumerate(examples) if example.messages]
    texts = [i for i, example in enumerate(examples) if not example.messages][:CONTINUED]
    prompts = [render(tokenizer, e.messages[: _prompt_length(e)], e.tools, prompt=True) for e in _of(examples, chats)]
    sizes = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]] if prompts else []
    asked = [n < min(len(data.held_out[i].input_ids), LONGEST_PROMPT) for i, n in zip(chats, sizes, strict=True)]
    chats, prompts = list(itertools.compress(chats, asked)), list(itertools.compress(prompts, asked))
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    if (streamed := getattr(core, "streamed", None)) and len(chats) > ROWS_AT_ONCE:
        why = f"each word of an answer brings {streamed.brings}"
        print(f"answering {ROWS_AT_ONCE} of {len(chats)} held-out rows: {why}", flush=True)
        chats, prompts = chats[:ROWS_AT_ONCE], prompts[:ROWS_AT_ONCE]
    longest = max((len(tokenizer(text)["input_ids"]) for e in _of(examples, chats) for text in e.references), default=0)
    answers: list[tuple[str, bool | None] | None] = [None] * len(examples)
    for i, found in zip(chats, generate(model, tokenizer, prompts, min(longest + 16, LONGEST_ANSWER)), strict=True):
        answers[i] = found
    halves = [f"{tokenizer.bos_token or ''}{_first_half(e.text)[-LONGEST_PROMPT:]}" for e in _of(examples, texts)]
    for i, found in zip(texts, generate(model, tokenizer, halves, CONTINUATION), strict=True):
        answers[i] = found.text, None
    return answers


def _of(examples: list[Example], numbers: list[int]) -> list[Example]:
    return [examples[i] for i in numbers]


def _padded(rows: list[Encoded], pad_id: int):
    """(ids, mask, labels), each (rows, longest row), padded on the right."""
    import torch

    width = max(len(row.input_ids) for row in rows)
    ids = [row.input_ids + [pad_id] * (width - len(row.input_ids)) for row in rows]
    labels = [row.labels + [IGNORE] * (width - len(row.labels)) for row in rows]
    mask = [[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)
