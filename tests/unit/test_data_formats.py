import json

import pytest

from llamanb.data.formats import UNANSWERABLE, detect
from llamanb.data.read import BadRow, Row, read_rows
from llamanb.errors import DataError
from llamanb.evaluate import _prompt_length


def convert(values: dict):
    row = Row("row 1", values)
    return detect([row], "file").convert(row)


def said(example) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in example.messages]


def test_alpaca():
    (one,) = convert({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert said(one) == [("user", "Add.\n\n1 2"), ("assistant", "3")]
    (two,) = convert({"instruction": "Add.", "input": "", "output": "3"})
    assert said(two)[0] == ("user", "Add.")


def test_self_instruct_seed_task():
    both = convert({"instruction": "Add.", "instances": [{"input": "1", "output": "a"}, {"input": "", "output": "b"}]})
    assert [said(e)[1][1] for e in both] == ["a", "b"]
    assert both[1].place == "row 1, instance 2"


def test_chat_messages_with_text_parts():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    (one,) = convert({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Hi"}]})
    assert said(one) == [("user", "Hello"), ("assistant", "Hi")]


def test_the_last_answer_that_is_learned_is_the_one_that_is_scored():
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "?"},
    ]
    last = {"role": "assistant", "content": "bad", "weight": 0}
    (one,) = convert({"messages": [*turns, last]})
    assert one.references == ("good",)
    assert _prompt_length(one) == 1
    with pytest.raises(BadRow, match="nothing to learn from"):
        convert({"messages": [turns[0], last]})


def test_sharegpt_with_system():
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    (one,) = convert({"conversations": turns, "system": "Be kind."})
    assert said(one) == [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi")]


def test_prompt_and_completion_as_text_and_as_turns():
    (one,) = convert({"prompt": "a", "completion": "b"})
    (two,) = convert(
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    )
    assert said(one) == said(two) == [("user", "a"), ("assistant", "b")]


def test_plain_text():
    (one,) = convert({"text": "Once upon a time"})
    assert one.text == "Once upon a time"


@pytest.mark.parametrize(
    "answers",
    [{"text": ["in 1066", "1066"], "answer_start": [1, 4]}, [{"text": "in 1066", "answer_start": 1}, {"text": "1066"}]],
)
def test_squad_in_both_layouts(answers):
    (one,) = convert({"context": "It was in 1066.", "question": "When?", "answers": answers})
    assert one.references == ("in 1066", "1066")
    assert said(one)[1] == ("assistant", "in 1066")
    assert "It was in 1066." in said(one)[0][1]


@pytest.mark.parametrize("answers", [{"text": [], "answer_start": []}, []])
def test_squad_question_without_an_answer(answers):
    (one,) = convert({"context": "c", "question": "q", "answers": answers, "is_impossible": True})
    assert one.references == (UNANSWERABLE,)
    assert said(one)[1] == ("assistant", UNANSWERABLE)


def test_messages_as_json_in_a_csv_cell():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (one,) = convert({"messages": json.dumps(turns)})
    assert said(one) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("values", "column", "what"),
    [
        ({"instruction": "a", "output": None}, "output", "null"),
        ({"instruction": "a", "output": " "}, "output", "empty"),
        ({"instruction": 3, "output": "b"}, "instruction", "int"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "input", "list"),
        ({"prompt": "a", "completion": ""}, "completion", "empty"),
        ({"text": ""}, "text", "empty"),
        ({"messages": None}, "messages", "null"),
        ({"messages": []}, "messages", "empty list"),
        ({"messages": "hello"}, "messages", "not a JSON list"),
        ({"messages": [["user", "a"]]}, "messages", "turn 1 is a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "no user"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, "messages", "turn 2"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "messages", "turn 2"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages", "'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "images"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]},
            "conversations",
            "turn 2",
        ),
        ({"context": "c", "question": "q", "answers": "a"}, "answers", "no list"),
        ({"context": "c", "question": "q", "answers": {"text": [""]}}, "answers", "no list"),
        ({"context": None, "question": "q", "answers": []}, "context", "null"),
        ({"instruction": "a", "instances": ["x"]}, "instances", "entry 1"),
    ],
)
def test_a_bad_row_names_its_column(values, column, what):
    with pytest.raises(BadRow) as caught:
        convert(values)
    assert caught.value.column == column
    assert what in caught.value.what


def _call(arguments) -> dict:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def test_arguments_of_a_call_may_be_json_text():
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [_call('{"b": 1}')]},
    ]
    (one,) = convert({"messages": turns, "tools": "[]"})
    assert one.messages[1]["tool_calls"][0]["function"]["arguments"] == {"b": 1}
    assert one.references == ()  # a call is not scored as text


@pytest.mark.parametrize("call", [_call("{"), _call("[1]"), _call(3), {"function": {}}, "weather"])
def test_a_call_that_is_none_is_a_bad_row(call):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(BadRow, match="turn 2"):
        convert({"messages": turns})


def test_unknown_columns_are_listed():
    with pytest.raises(DataError, match="'colour'"):
        convert({"colour": "red", "size": 3})


def test_rows_that_ask_the_same_have_one_key():
    (one,) = convert({"instruction": "a", "output": "b"})
    (two,) = convert({"instruction": "a", "output": "c"})
    assert one.prompt_key == two.prompt_key


def test_real_files_are_recognised(real_data):
    expected = {
        "alpaca_seed_tasks.jsonl": "Self-Instruct seed tasks",
        "alpaca_seed_tasks_alpaca_format.json": "Alpaca",
        "squad_flat_sample.json": "SQuAD",
        "squad_v2_sample.json": "SQuAD",
    }
    for name, found in expected.items():
        rows, bad = read_rows(str(real_data / name))
        row_format = detect(rows, name)
        assert row_format.name == found
        assert bad == []
        assert all(row_format.convert(row) for row in rows)


def test_both_squad_layouts_give_the_same_examples(real_data):
    def examples(name):
        rows, _ = read_rows(str(real_data / name))
        return {e.messages[0]["content"]: e.references for row in rows for e in detect(rows, name).convert(row)}

    flat, nested = examples("squad_flat_sample.json"), examples("squad_v2_sample.json")
    shared = flat.keys() & nested.keys()
    assert shared
    assert all(flat[question] == nested[question] for question in shared)
    assert (UNANSWERABLE,) in {*flat.values(), *nested.values()}
