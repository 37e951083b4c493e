"""Answers: in batches, up to the end of the turn, the same with and without others beside them."""

import json
from dataclasses import replace

import pytest
import torch

from llamanb import Card, Recipe, answer, load_adapter, load_data, plan, side_by_side
from llamanb.data.encode import load_tokenizer
from llamanb.errors import RecipeError
from llamanb.evaluate import compare, evaluate
from llamanb.generate import batches, generate
from llamanb.model import load_model
from llamanb.tiny import CHECKPOINT

CPU = Card("CPU", None)


@pytest.fixture(scope="module")
def base():
    tokenizer = load_tokenizer(CHECKPOINT)
    return load_model(
        plan(Recipe(model="tiny", dataset="tiny", method="lora", max_length=128), CPU), tokenizer
    ), tokenizer


def prompts(tokenizer, count=5):
    from llamanb.data.encode import render
    from llamanb.tiny import rows

    notes = [row["messages"][0]["content"] for row in rows("eval", count=count)]
    return [render(tokenizer, [{"role": "user", "content": note}], prompt=True) for note in notes]


def test_a_model_trained_with_end_of_turn_stops_by_itself(tuned_run):
    """Also one whose base says more: the answers are scored for it, and shown."""
    after = tuned_run.compare().after
    assert after.ended == 1.0
    assert max(map(len, after.answers)) < 120
    assert "answers that end by themselves" in str(tuned_run.compare())


def test_each_answer_is_the_same_alone_and_in_a_batch(base):
    model, tokenizer = base
    asked = prompts(tokenizer)
    together = generate(model, tokenizer, asked, 24)
    alone = [generate(model, tokenizer, [one], 24)[0] for one in asked]
    assert together == alone


def test_one_that_is_cut_off_is_said_to_be(tuned_run):
    model, tokenizer = load_adapter(tuned_run.folder)
    (long,), (short,) = (generate(model, tokenizer, prompts(tokenizer, 1), n) for n in (60, 2))
    assert (long.ended, short.ended) == (True, False)
    assert long.text.startswith(short.text)


def test_what_is_drawn_depends_on_the_seed_alone(base):
    model, tokenizer = base
    asked, state = prompts(tokenizer), torch.get_rng_state()
    drawn = [generate(model, tokenizer, asked, 24, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mode_stays(base):
    model, tokenizer = base
    model.train()
    generate(model, tokenizer, prompts(tokenizer, 1), 2)
    assert model.training
    model.eval()


def test_batches_are_bounded_in_rows_and_in_padded_tokens():
    assert [len(batch) for batch in batches([1] * 40, int)] == [16, 16, 8]
    assert list(batches([1000, 1100, 2000, 5000, 10], int)) == [[1000, 1100], [2000], [5000], [10]]
    assert list(batches([], int)) == []


def test_side_by_side_is_the_base_beside_what_it_became(tuned_run):
    model, tokenizer = load_adapter(tuned_run.folder)
    question = tuned_run.scores.questions[0]
    table = side_by_side(model, tokenizer, [question], temperature=0, max_new_tokens=40)
    assert table.headers == ["question", "without the adapter", "with it"]
    assert (
        table.rows[0][2] == tuned_run.scores.after.answers[0] == answer(model, tokenizer, question, max_new_tokens=40)
    )
    told, before = table.rows[0][1].removesuffix(" …"), tuned_run.scores.before.answers[0]
    assert told.startswith(before) or before.startswith(told)
    drawn = [side_by_side(model, tokenizer, [question], seed=seed, temperature=2.0).rows for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_side_by_side_of_a_model_without_adapter_has_one_column(base):
    assert side_by_side(*base, ["Why?"], max_new_tokens=4).headers == ["question", "answer"]


@pytest.mark.parametrize("wrong", [{"questions": []}, {"questions": ["Why?"], "temperature": -1}])
def test_nothing_to_answer_is_an_error(base, wrong):
    with pytest.raises(RecipeError, match="nothing can be answered"):
        side_by_side(*base, **wrong)


def test_plain_text_is_gone_on_with(tmp_path, base):
    """Three rows of it, so that there is something to read; no word on whether that was right."""
    texts = [f"note {n}: bring {n} lamps to Oslo by noon please" for n in range(30)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = load_data(Recipe(model="tiny", dataset=str(rows), eval_rows=5, max_length=128))
    found = evaluate(base[0], data)
    assert [bool(text) for text in found.answers] == [True] * 3 + [False] * 2
    assert (found.exact_match, found.ended) == (None, None)
    compared = compare(found, found, data)
    whole = [f"{q} {r}" for q, r in zip(compared.questions, compared.references, strict=True)]
    assert whole == [example.text for example in data.held_out_examples]
    assert compared.tables()[1].rows[0][0].startswith("note")


def test_squad_rows_are_scored_as_squad_does(tmp_path, base, monkeypatch):
    questions = [
        {"context": "Oslo is red.", "question": f"What is Oslo, {n}?", "answers": {"text": answers, "answer_start": []}}
        for n, answers in enumerate([["red"], [], ["the red one", "red"]] * 4)
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, questions)))
    data = load_data(Recipe(model="tiny", dataset=str(rows), eval_rows=2, max_length=256))
    said = {"red": "A red.", "unanswerable": "Unanswerable.", "the red one": "one"}
    wanted = {"red": (True, 1.0), "unanswerable": (True, 1.0), "the red one": (False, 2 / 3)}
    told = [(said[example.references[0]], True) for example in data.held_out_examples]
    monkeypatch.setattr("llamanb.evaluate.generate", lambda *args, **options: told[: len(args[2])])
    found = evaluate(base[0], data)
    right = [wanted[example.references[0]] for example in data.held_out_examples]
    assert [(row.exact, pytest.approx(row.f1)) for row in found.rows] == right
    assert "F1" in str(compare(found, found, data))


def test_a_row_whose_answer_begins_after_max_length_is_not_answered(base, tmp_path, monkeypatch):
    """Nor one with a prompt that takes more memory than a training; its loss is scored."""
    model, _ = base
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    long = [*turns, {"role": "user", "content": "x " * 300}, {"role": "assistant", "content": "Yes"}]
    rows = [{"messages": long}, *({"messages": [{"role": "user", "content": f"{i}?"}, turns[1]]} for i in range(9))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe(
        model="tiny", dataset=str(tmp_path / "rows.jsonl"), max_length=64, long_rows="truncate", eval_rows=9
    )
    data = load_data(recipe)
    every = replace(data, held_out=data.train + data.held_out, held_out_examples=_examples_of(recipe, data))
    scores = evaluate(model, every)
    asked = [len(example.messages) == 2 for example in every.held_out_examples]
    assert asked.count(False) == 1
    assert [row.exact is not None for row in scores.rows] == asked
    assert all(row.nats > 0 for row in scores.rows)
    monkeypatch.setattr("llamanb.evaluate.LONGEST_PROMPT", 5)
    assert [row.exact for row in evaluate(model, every).rows] == [None] * 10


def _examples_of(recipe, data):
    """Examples of the rows to train on, and of those held out."""
    from llamanb.data import _examples

    held = {example.place for example in data.held_out_examples}
    return [one for one in _examples(recipe)[0] if one.place not in held] + data.held_out_examples
