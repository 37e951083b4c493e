"""The speed benchmark on rows of real lengths: which rows are drawn, and that real tokens alone are counted."""

from types import SimpleNamespace

import pytest

from benchmarks.speed_report import BUSY, WALL, Results, figures, report, targets
from benchmarks.speed_rows import PADDED_ROWS, REAL, ROWS, drawn, grid, real_rows, standing
from benchmarks.speed_stacks import token_rows
from benchmarks.speed_worker import Gpu, step_tokens, turns

SESSION = {"length": 128, "rows": 64, "effective": 8, "lengths": str(REAL)}


def test_the_committed_lengths_are_those_of_the_real_rows(real_data, trl_template, tmp_path):
    from llamanb import Recipe
    from llamanb.data import _examples
    from llamanb.data.encode import Encoder, load_tokenizer
    from tests.checkpoints import real_tokenizer

    real_tokenizer(real_data / "llama3_tokenizer.model", trl_template("llama3_1")).save_pretrained(tmp_path)
    examples, *_ = _examples(Recipe(dataset=str(real_data / "alpaca_seed_tasks_alpaca_format.json")))
    encoder = Encoder(load_tokenizer(tmp_path), 8192)
    rows = [encoder.encode(example) for example in examples]
    assert real_rows(REAL) == [(len(row.input_ids), row.trained_tokens) for row in rows]


def test_rows_are_planned_for_the_longest_of_the_file():
    real = [row for row in ROWS.values() if row.lengths]
    assert [(row.model, row.card) for row in real] == [("8b", "T4"), ("1b", "T4")]
    assert {row.length for row in real} == {max(tokens for tokens, _ in real_rows(REAL))}
    for row in real:
        assert [one.label for one in standing(row)] == ["llamanb", *(f"trl:micro={micro}" for micro in PADDED_ROWS)]
        assert grid(row) == []


def test_every_stack_draws_the_same_rows_and_long_ones_are_cut():
    found, whole = drawn(SESSION), drawn({**SESSION, "length": 2000})
    assert found == drawn(SESSION)
    assert len(found) == 64
    assert set(whole) <= set(real_rows(REAL))
    assert len(set(whole)) > 30
    for (tokens, trained), (all_tokens, all_trained) in zip(found, whole, strict=True):
        assert tokens == min(128, all_tokens)
        assert 1 <= trained == max(1, all_trained - (all_tokens - tokens))
    assert drawn({"length": 9, "rows": 2}) == [(9, 9)] * 2


def test_random_ids_have_the_lengths_drawn_and_end_in_what_is_trained():
    made = token_rows(1000, SESSION)
    sizes = [(len(ids), sum(label >= 0 for label in labels)) for ids, labels in zip(*made.values(), strict=True)]
    assert sizes == drawn(SESSION)
    for ids, labels in zip(*made.values(), strict=True):
        assert labels[-1] == ids[-1]
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    even = token_rows(1000, {"length": 9, "rows": 2})
    assert even["labels"] == even["input_ids"]


def test_real_tokens_of_the_steps_that_were_timed_and_profiled_are_told():
    tokens = step_tokens(SESSION)
    assert len(tokens) == 8
    assert sum(tokens) == sum(length for length, _ in drawn(SESSION))
    assert step_tokens({"length": 9, "rows": 16, "effective": 8}) is None
    commands = [{"do": "block", "micro_steps": 99, "steps": 5, "at_most_s": 9, "profile": 2}, {"do": "close"}]
    sent = []
    channel = SimpleNamespace(send=lambda **answer: sent.append(answer), receive=lambda: commands.pop(0))
    turn = turns(Gpu("cpu", None), channel, 3, {"micro": 4, "accumulation": 2}, tokens)
    control = SimpleNamespace(should_training_stop=False)
    turn.on_train_begin(None, None, control)
    while not control.should_training_stop:
        turn.on_step_end(None, None, control)
    block = sent[1]["block"]
    assert (block["steps"], block["profile"]["steps"]) == (5, 2)
    assert block["tokens"] == sum(tokens[3:8]), "after three to warm up"
    assert block["profile"]["tokens"] == sum(tokens[:2]), "the rows come round again"


def block(label, micro, step_s, tokens=4000, row="rows-8b"):
    busy = {"busy_s": step_s, "matrix_s": step_s, "other_s": 0.0, "within_s": 0.0, "link_s": 0.0}
    return {
        "kind": "block",
        "row": row,
        "contestant": label,
        "micro": micro,
        "accumulation": 8 // micro,
        "micro_s": [step_s / 3] * 12,  # as many as the rows happen to need
        "step_s": [step_s * 0.5, step_s, step_s, step_s * 1.5],
        "tokens": tokens,
        "profile": {"steps": 2, "tokens": tokens // 2, **busy},
    }


def test_figures_are_for_a_real_token():
    found = figures([block("llamanb", 2, 0.3), block("llamanb", 2, 0.3, tokens=8000)], 1328, None)
    assert found[WALL] == pytest.approx(2 * 4 * 0.3 / 12000 * 1e6)
    assert found[BUSY] == pytest.approx(2 * 0.3 / 6000 * 1e6)


def test_padded_batches_count_with_their_best_micro_batch():
    found = [block("llamanb", 4, 0.1), block("trl:micro=8", 8, 0.25), block("trl:micro=2", 2, 0.21)]
    (target,) = [target for target in targets(Results(found)) if "real lengths" in target[0]]
    assert target[1:] == ("rows-8b 2.10 (1 of 2 rows measured)", None)
    found += [block("llamanb", 8, 0.1, row="rows-1b"), block("trl:micro=4", 4, 0.19, row="rows-1b")]
    (target,) = [target for target in targets(Results(found)) if "real lengths" in target[0]]
    assert target[1].startswith("rows-8b 2.10, rows-1b 1.90")
    assert target[2] is False
    text = report(found)
    assert "8b, rows of up to 1328 tokens, pretend T4\n" in text
    assert "| rows-8b | wall time |  |  |  | 2.10 |" in text
