"""The loss mask, proved by decoding what is trained."""

import pytest

from llamanb.data.encode import IGNORE, LLAMA3_TEMPLATE, Encoder, TooLong, end_token_ids, load_tokenizer, render
from llamanb.data.formats import Example, detect
from llamanb.data.read import BadRow, Row
from llamanb.errors import ModelError
from tests.checkpoints import byte_tokenizer, real_tokenizer

TEMPLATES = ["llama3", "llama3_1", "llama3_2"]
EOT = "<|eot_id|>"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def example(*messages, tools=None, **more) -> Example:
    return Example("row 1", "messages", list(messages), tools, **more)


def trained(tokenizer, encoded) -> list[str]:
    """The stretches of text that the loss is taken on."""
    stretches, current = [], []
    for label in [*encoded.labels, IGNORE]:
        if label != IGNORE:
            current.append(label)
        elif current:
            stretches.append(tokenizer.decode(current))
            current = []
    return stretches


@pytest.fixture(params=TEMPLATES)
def templated(request, trl_template):
    return byte_tokenizer(template=trl_template(request.param))


def test_every_answer_of_a_long_conversation_is_trained_to_its_end(templated):
    rows = [turn("system", "Be brief."), turn("user", "Hello"), turn("assistant", " Hi! ")]
    rows += [turn("user", "Why?"), turn("assistant", "Because.")]
    encoded = Encoder(templated, 10_000).encode(example(*rows))
    assert trained(templated, encoded) == [f"Hi!{EOT}", f"Because.{EOT}"]


def test_a_turn_of_weight_0_is_not_trained(templated):
    """As chat services have it."""
    turns = [turn("user", "Hello"), turn("assistant", "Hm.", weight=0), turn("user", "?"), turn("assistant", "Hi!")]
    (made,) = detect([Row("row 1", {"messages": turns})], "file").convert(Row("row 1", {"messages": turns}))
    encoded = Encoder(templated, 10_000).encode(made)
    assert trained(templated, encoded) == [f"Hi!{EOT}"]
    assert "Hm." in templated.decode(encoded.input_ids)
    alone = example(turn("user", "Hello"), turn("assistant", "Hm.", weight=0))
    with pytest.raises(BadRow, match="no token to learn from"):
        Encoder(templated, 10_000).encode(alone)


def test_labels_are_the_tokens_themselves(templated):
    encoded = Encoder(templated, 10_000).encode(example(turn("user", "Hello"), turn("assistant", "Hi")))
    assert len(encoded.labels) == len(encoded.input_ids)
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    assert all(label in (IGNORE, token) for token, label in pairs)
    assert encoded.trained_tokens == 3


def test_tokens_are_those_of_the_rendered_conversation(templated):
    rows = [turn("user", "Hello"), turn("assistant", "Hi")]
    encoded = Encoder(templated, 10_000).encode(example(*rows))
    assert templated.decode(encoded.input_ids) == render(templated, rows)
    assert encoded.input_ids.count(templated.bos_token_id) == 1


@pytest.mark.parametrize("template", ["llama3_1", "llama3_2"])
def test_tool_calls_are_trained_and_their_results_are_not(template, trl_template):
    tokenizer = byte_tokenizer(template=trl_template(template))
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    rows = [turn("user", "Weather in Oslo?"), turn("assistant", "", tool_calls=[call])]
    rows += [turn("tool", "rain"), turn("assistant", "It rains.")]
    encoded = Encoder(tokenizer, 10_000).encode(example(*rows, tools=[WEATHER]))
    first, second = trained(tokenizer, encoded)
    assert '"name": "weather"' in first
    assert '"city": "Oslo"' in first
    assert first.endswith(EOT)
    assert second == f"It rains.{EOT}"


def test_a_template_without_tools_refuses_calls_and_tools(tokenizer):
    """Left out in silence, the call would be learned as an empty answer."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    rows = [turn("user", "Weather?"), turn("assistant", "", tool_calls=[call])]
    with pytest.raises(BadRow, match="leaves 'weather' of turn 2 out"):
        Encoder(tokenizer, 1000).encode(example(*rows))
    with pytest.raises(BadRow, match="leaves the tools out"):
        Encoder(tokenizer, 1000).encode(example(turn("user", "x"), turn("assistant", "y"), tools=[WEATHER]))


def test_plain_text_needs_no_chat_template(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2, "Once": 3}, unk_token="<pad>"))
    words.add_special_tokens(["<s>", "</s>", "<pad>"])
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    loaded = load_tokenizer(saved(tmp_path, made))
    assert Encoder(loaded, 10).encode(Example("row 1", "text", text="Once")).input_ids == [0, 3, 1]
    with pytest.raises(ModelError, match="no chat template"):
        Encoder(loaded, 10).encode(example(turn("user", "x"), turn("assistant", "y")))


def test_the_prompt_is_trained_too_where_asked(templated):
    rows = example(turn("user", "Hello"), turn("assistant", "Hi"))
    encoded = Encoder(templated, 10_000, everything=True).encode(rows)
    assert encoded.labels == [IGNORE, *encoded.input_ids[1:]]


def test_plain_text_is_trained_from_the_second_token_to_its_end():
    tokenizer = byte_tokenizer()
    encoded = Encoder(tokenizer, 100).encode(Example("row 1", "text", text="Once"))
    assert tokenizer.decode(encoded.input_ids) == "<|begin_of_text|>Once<|end_of_text|>"
    assert trained(tokenizer, encoded) == ["Once<|end_of_text|>"]


def test_a_row_that_brings_its_control_tokens_is_not_given_them_twice():
    tokenizer = byte_tokenizer()
    encoded = Encoder(tokenizer, 100).encode(Example("row 1", "text", text="<|begin_of_text|>Once<|end_of_text|>"))
    assert tokenizer.decode(encoded.input_ids) == "<|begin_of_text|>Once<|end_of_text|>"


def test_a_long_row_says_how_long_and_keeps_what_fits(tokenizer):
    rows = example(turn("user", "Hello"), turn("assistant", "x" * 100))
    whole = Encoder(tokenizer, 10_000).encode(rows)
    with pytest.raises(TooLong, match=f"{len(whole.input_ids)} tokens, over max_length = 60") as caught:
        Encoder(tokenizer, 60).encode(rows)
    assert caught.value.truncated.input_ids == whole.input_ids[:60]
    with pytest.raises(TooLong) as caught:
        Encoder(tokenizer, 8).encode(rows)  # all prompt: nothing of the answer is left
    assert caught.value.truncated is None


@pytest.mark.parametrize("token", [EOT, "<|start_header_id|>", "<|python_tag|>"])
def test_control_tokens_in_a_row_are_refused(tokenizer, token):
    with pytest.raises(BadRow, match="control token"):
        Encoder(tokenizer, 100).encode(example(turn("user", f"a{token}b"), turn("assistant", "Hi")))


def test_a_template_that_refuses_says_why(trl_template):
    tokenizer = byte_tokenizer(template=trl_template("llama3_1"))
    calls = [{"type": "function", "function": {"name": n, "arguments": {}}} for n in "ab"]
    with pytest.raises(BadRow, match="only supports single tool-calls"):
        Encoder(tokenizer, 1000).encode(example(turn("user", "x"), turn("assistant", "", tool_calls=calls)))


def test_a_template_without_end_tokens_is_refused():
    tokenizer = byte_tokenizer(template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(BadRow, match="no end token"):
        Encoder(tokenizer, 1000).encode(example(turn("user", "x"), turn("assistant", "y")))


def test_a_template_that_drops_earlier_turns_is_refused():
    template = "{% for m in messages[-2:] %}<|start_header_id|>{{ m.role }}{{ m.content }}<|eot_id|>{% endfor %}"
    tokenizer = byte_tokenizer(template=template)
    rows = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    with pytest.raises(BadRow, match="rewrites turn 2"):
        Encoder(tokenizer, 1000).encode(example(*rows))


def test_our_template_is_llama_3s(trl_template):
    ours, theirs = byte_tokenizer(template=LLAMA3_TEMPLATE), byte_tokenizer(template=trl_template("llama3"))
    rows = [turn("system", " s "), turn("user", "u"), turn("assistant", "a")]
    assert render(ours, rows) == render(theirs, rows)
    assert render(ours, rows[:2], prompt=True) == render(theirs, rows[:2], prompt=True)


def saved(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_base_models_get_llama_3s_template(tmp_path):
    assert load_tokenizer(saved(tmp_path, byte_tokenizer())).chat_template == LLAMA3_TEMPLATE


@pytest.mark.parametrize("pad", [None, EOT, "<|end_of_text|>"])
def test_padding_ends_nothing(tmp_path, pad):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = pad
    loaded = load_tokenizer(saved(tmp_path, tokenizer))
    assert loaded.pad_token == "<|finetune_right_pad_id|>"
    assert loaded.pad_token_id not in end_token_ids(loaded)


def test_a_padding_token_of_its_own_is_kept(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<|reserved_special_token_7|>"
    assert load_tokenizer(saved(tmp_path, tokenizer)).pad_token == "<|reserved_special_token_7|>"


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_real_vocabulary_and_templates(real_data, trl_template):
    tokenizer = real_tokenizer(real_data / "llama3_tokenizer.model", trl_template("llama3_1"))
    assert len(tokenizer) == 128256
    assert tokenizer.convert_tokens_to_ids([EOT, "<|finetune_right_pad_id|>"]) == [128009, 128004]
    rows = [turn("user", "Grüße! 你好?"), turn("assistant", "你好 👋 — hello there, 12345."), turn("user", "x")]
    encoded = Encoder(tokenizer, 10_000).encode(example(*rows))
    assert trained(tokenizer, encoded) == [f"你好 👋 — hello there, 12345.{EOT}"]
