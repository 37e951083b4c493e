import json
import re
import subprocess
import sys

import pytest

from llamanb import Recipe, load_data
from llamanb.errors import DataError


def write(tmp_path, rows: list, name: str = "rows.json"):
    path = tmp_path / name
    path.write_text(json.dumps(rows))
    return str(path)


def alpaca(n: int) -> list[dict]:
    return [{"instruction": f"Say {i}", "output": f"{i}!"} for i in range(n)]


@pytest.fixture
def recipe(mini):
    return lambda dataset, **fields: Recipe(**{"model": str(mini), "dataset": dataset, "max_length": 400, **fields})


def test_split_holds_out_a_fifth_at_most(tmp_path, recipe):
    data = load_data(recipe(write(tmp_path, alpaca(20))))
    assert (len(data.train), len(data.held_out), len(data.held_out_examples)) == (16, 4, 4)
    data = load_data(recipe(write(tmp_path, alpaca(20)), eval_rows=2))
    assert (len(data.train), len(data.held_out)) == (18, 2)


def test_a_common_question_does_not_take_the_split_over(tmp_path, recipe):
    rows = [{"instruction": "A", "output": f"{i}"} for i in range(100)] + alpaca(4)
    for seed in range(8):
        data = load_data(recipe(write(tmp_path, rows), eval_rows=1, seed=seed))
        assert (len(data.train), len(data.held_out)) == (103, 1)


def test_rows_are_held_out_of_those_that_are_left(tmp_path, recipe):
    rows = alpaca(7) + [{"instruction": f"long {i}", "output": "x" * 500} for i in range(3)]
    for seed in range(8):
        data = load_data(recipe(write(tmp_path, rows), long_rows="skip", seed=seed))
        assert (len(data.train), len(data.held_out), len(data.skipped)) == (6, 1, 3)


def test_split_follows_the_seed(tmp_path, recipe):
    path = write(tmp_path, alpaca(50))

    def held(seed):
        return [e.messages[0]["content"] for e in load_data(recipe(path, seed=seed)).held_out_examples]

    assert held(1) == held(1) != held(2)


def test_the_same_question_never_stands_on_both_sides(tmp_path, recipe):
    rows = [{"instruction": f"Say {i % 5}", "output": f"answer {i}"} for i in range(40)]
    data = load_data(recipe(write(tmp_path, rows)))
    decode = data.tokenizer.decode
    asked = {e.messages[0]["content"] for e in data.held_out_examples}
    assert len(data.held_out) == 8  # all eight rows of the one question
    assert not any(question in decode(row.input_ids) for row in data.train for question in asked)


def test_held_out_rows_and_examples_belong_together(tmp_path, recipe):
    data = load_data(recipe(write(tmp_path, alpaca(30))))
    for row, example in zip(data.held_out, data.held_out_examples, strict=True):
        assert example.messages[0]["content"] in data.tokenizer.decode(row.input_ids)


def test_bad_rows_stop_with_place_and_column(tmp_path, recipe):
    rows = alpaca(10)
    rows[2]["output"] = None
    rows[7] = {"instruction": "only"}
    with pytest.raises(DataError) as caught:
        load_data(recipe(write(tmp_path, rows)))
    assert "2 rows cannot be trained on" in caught.value.what
    assert "row 3, column 'output': is null" in caught.value.why
    assert "row 8, column 'output': is missing" in caught.value.why


def test_bad_rows_are_skipped_and_reported_where_asked(tmp_path, recipe):
    rows = alpaca(10)
    rows[2]["output"] = None
    data = load_data(recipe(write(tmp_path, rows), bad_rows="skip"))
    assert len(data.train) + len(data.held_out) == 9
    assert data.skipped == ["row 3, column 'output': is null"]
    assert "row 3, column 'output': is null" in str(data)


def test_long_rows_stop_with_the_length_that_would_do(tmp_path, recipe):
    rows = [*alpaca(10), {"instruction": "long", "output": "x" * 500}]
    path = write(tmp_path, rows)
    with pytest.raises(DataError, match="row 11, column 'output'") as caught:
        load_data(recipe(path))
    needed = int(re.search(r"max_length = (\d+) takes them all", caught.value.fix)[1])
    assert len(load_data(recipe(path, max_length=needed)).train) == 9
    with pytest.raises(DataError):
        load_data(recipe(path, max_length=needed - 1))


def test_long_rows_skipped_or_cut_where_asked(tmp_path, recipe):
    path = write(tmp_path, [*alpaca(10), {"instruction": "long", "output": "x" * 500}])
    skipped = load_data(recipe(path, long_rows="skip"))
    assert len(skipped.train) + len(skipped.held_out) == 10
    assert skipped.skipped[0].startswith("row 11")
    cut = load_data(recipe(path, long_rows="truncate"))
    assert max(len(row.input_ids) for row in [*cut.train, *cut.held_out]) == 400
    assert cut.skipped == []


def test_of_plain_text_that_is_cut_the_words_that_are_left_are_held_out(tmp_path, recipe):
    path = write(tmp_path, [{"text": f"{i} " + "word " * 500} for i in range(10)])
    data = load_data(recipe(path, long_rows="truncate", eval_rows=2))
    assert len(data.held_out) == 2
    for row, example in zip(data.held_out, data.held_out_examples, strict=True):
        assert data.tokenizer.decode(row.input_ids, skip_special_tokens=True) == example.text


@pytest.mark.parametrize("row", [{"text": "half \ud83d"}, {"prompt": "\ud83d?", "completion": "b"}])
def test_half_a_character_is_a_bad_row(row, tmp_path, recipe):
    rows = [dict.fromkeys(row, f"{i}") for i in range(8)]
    path = write(tmp_path, [*rows, row])
    with pytest.raises(DataError, match=r"row 9, column '.*': holds half of a character"):
        load_data(recipe(path))
    assert len(load_data(recipe(path, bad_rows="skip")).skipped) == 1


@pytest.mark.parametrize("row", [{"completion": "b"}, {"prompt": "a"}, {"text": "c"}])
def test_a_row_that_lacks_prompt_or_completion_is_a_bad_row(row, tmp_path, recipe):
    path = write(tmp_path, [*({"prompt": f"{i}", "completion": "b"} for i in range(8)), row])
    with pytest.raises(DataError, match=r"row 9, column '(prompt|completion)'"):
        load_data(recipe(path))
    assert len(load_data(recipe(path, bad_rows="skip")).skipped) == 1


def test_all_rows_bad_is_one_error_even_where_they_are_skipped(tmp_path, recipe):
    with pytest.raises(DataError, match="4 rows cannot be trained on"):
        load_data(recipe(write(tmp_path, [{"instruction": f"{i}", "output": ""} for i in range(4)]), bad_rows="skip"))


def test_one_row_only(tmp_path, recipe):
    path = write(tmp_path, alpaca(1))
    with pytest.raises(DataError, match="eval_rows = 0"):
        load_data(recipe(path))
    data = load_data(recipe(path, eval_rows=0))
    assert (len(data.train), len(data.held_out)) == (1, 0)


def test_tiny_default_brings_its_own_split():
    data = load_data(Recipe(eval_rows=20, max_length=256))
    assert len(data.held_out) == 20
    trained = {tuple(row.input_ids) for row in data.train}
    assert not any(tuple(row.input_ids) in trained for row in data.held_out)


def test_bad_rows_are_told_before_torch_is_loaded(tmp_path, mini):
    path = write(tmp_path, [{"instruction": "a", "output": ""}] * 3)
    code = f"""
import sys
from llamanb import LlamanbError, Recipe, load_data
try:
    load_data(Recipe(model={str(mini)!r}, dataset={path!r}))
except LlamanbError as error:
    print(type(error).__name__, [m for m in ("torch", "trl", "peft", "bitsandbytes") if m in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "DataError []"


def test_good_rows_need_no_torch_either(tmp_path, mini):
    path = write(tmp_path, alpaca(5))
    code = f"""
import sys
from llamanb import Recipe, load_data
data = load_data(Recipe(model={str(mini)!r}, dataset={path!r}))
print(len(data.train), "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "4 False"


@pytest.fixture(scope="module")
def real_vocabulary(real_data, tmp_path_factory, trl_template):
    from tests.checkpoints import make_checkpoint, real_tokenizer

    tokenizer = real_tokenizer(real_data / "llama3_tokenizer.model", trl_template("llama3_2"))
    return tokenizer, make_checkpoint("mini", tmp_path_factory.mktemp("real"), tokenizer)


@pytest.mark.parametrize(
    "name",
    [
        "alpaca_seed_tasks.jsonl",
        "alpaca_seed_tasks_alpaca_format.json",
        "squad_flat_sample.json",
        "squad_v2_sample.json",
    ],
)
def test_real_rows_with_the_real_vocabulary(real_data, real_vocabulary, name):
    tokenizer, model = real_vocabulary
    data = load_data(Recipe(model=str(model), dataset=str(real_data / name), max_length=4096))
    assert data.skipped == []
    for row, example in zip(data.held_out, data.held_out_examples, strict=True):
        learned = tokenizer.decode([label for label in row.labels if label != -100])
        assert learned == example.messages[-1]["content"].strip() + "<|eot_id|>"


def test_the_tiny_rows_without_any_held_out():
    data = load_data(Recipe(eval_rows=0))
    assert data.train
    assert data.held_out == []
