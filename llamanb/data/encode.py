"""From an Example to token ids and the labels the loss is taken on.

The assistant's turns are found in the rendered text: what a template adds when one more turn is rendered is that turn.
So any template whose turns follow each other works, the checkpoint's own unchanged among them, and every trained span
ends in the end-of-turn token. Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from llamanb.data.formats import Example
from llamanb.data.read import BadRow
from llamanb.errors import ModelError

IGNORE = -100
"""Label of a token that is not trained: cross entropy's `ignore_index`."""
DATE = "26 Jul 2024"
"""Llama 3.1 and 3.2 write a date into the prompt. The templates' own fallback, so a row is the same row tomorrow."""
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""Llama 3's chat format (Meta's model card), for base models, which bring no template."""
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|reserved_special_token_250|>", "<pad>")
SURROGATE = re.compile("[\ud800-\udfff]")
END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>", "<|im_end|>")


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row and, at each position, the id to learn or IGNORE."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORE for label in self.labels)


def load_tokenizer(folder: Path):
    """The checkpoint's tokenizer, with a chat template and a padding token that ends nothing.

    Padding with the end-of-text token, as many recipes do, hides every end-of-text from the loss: such models never
    stop. Raises ModelError when the folder has no tokenizer or no token is free for padding.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error).split("\n")[0]
        raise ModelError(f"no tokenizer in {folder}", why, "the folder needs a tokenizer.json") from None
    vocabulary, marks = tokenizer.get_vocab(), {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    if tokenizer.chat_template is None and marks <= vocabulary.keys():
        tokenizer.chat_template = LLAMA3_TEMPLATE
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.eos_token, *END_TOKENS):
        free = next((t for t in PAD_TOKENS if t in vocabulary), None)
        if free is None:
            raise ModelError(
                f"the tokenizer in {folder} has no token for padding",
                f"none of {', '.join(PAD_TOKENS)} is in its vocabulary, and an end token would teach never to stop",
                "add a padding token to the tokenizer",
            )
        tokenizer.pad_token = free
    tokenizer.padding_side = "right"
    return tokenizer


def end_token_ids(tokenizer) -> list[int]:
    """Ids that end a turn or a text; generation stops at any of them."""
    names = dict.fromkeys([tokenizer.eos_token, *END_TOKENS])
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[name] for name in names if name in vocabulary]


def control_tokens(tokenizer) -> re.Pattern:
    """Finds what would begin or end a turn by itself where it stands in a text."""
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, control)) or "(?!)")


def render(tokenizer, messages: list[dict], tools: list[dict] | None = None, *, prompt: bool = False) -> str:
    """The conversation as the model sees it; with `prompt`, up to where the assistant's next turn begins.

    Raises ModelError for a tokenizer that has no chat template and none of Llama 3's tokens to make one from.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            "this checkpoint's tokenizer has no chat template",
            "and Llama 3's does not fit: its vocabulary lacks <|start_header_id|> or <|eot_id|>",
            "use the Instruct checkpoint, or plain text rows (a column `text`)",
        )
    options = {"tokenize": False, "add_generation_prompt": prompt, "date_string": DATE}
    return tokenizer.apply_chat_template(messages, tools=tools, **options)


class Encoder:
    """Turns examples into token ids and labels, with one tokenizer and one `max_length` (tokens)."""

    def __init__(self, tokenizer, max_length: int, *, everything: bool = False):
        self.tokenizer, self.max_length, self.everything = tokenizer, max_length, everything
        self.bos = tokenizer.bos_token or ""
        self.control = control_tokens(tokenizer)
        self.end_of_text = "<|end_of_text|>" if self.control.search("<|end_of_text|>") else tokenizer.eos_token

    def encode(self, example: Example) -> Encoded:
        """Token ids and labels of one example.

        Raises BadRow for text that holds control tokens, a conversation that the template refuses, and a row with no
        token to learn; TooLong for a row of more than `max_length` tokens.
        """
        if example.text is not None:
            text = example.text if example.text.startswith(self.bos) else self.bos + example.text
            text += "" if text.endswith(self.end_of_text) else self.end_of_text
            spans = [(len(self.bos), len(text))]
        else:
            text, spans = self._rendered(example)
        if SURROGATE.search(text):
            raise BadRow(example.column, "holds half of a character (a surrogate without the other), which is no text")
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = tokens["input_ids"]
        if self.everything:
            spans = [(0, len(text))]
        labels = [
            token if any(begin <= first < end and last <= end for begin, end in spans) else IGNORE
            for token, (first, last) in zip(ids, tokens["offset_mapping"], strict=True)
        ]
        encoded = Encoded(ids, [IGNORE, *labels[1:]])  # nothing stands before the first token to predict it from
        if not encoded.trained_tokens:
            raise BadRow(example.column, "has no token to learn from")
        if len(ids) > self.max_length:
            end = tokens["offset_mapping"][self.max_length - 1][1] if example.text else 0
            raise TooLong(example.column, encoded, self.max_length, example.text and text[len(self.bos) : end])
        return encoded

    def _rendered(self, example: Example) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and where in it the assistant's words and end-of-turn tokens stand (characters)."""
        import jinja2

        messages, tools, column = example.messages, example.tools, example.column
        if held := self.control.search(json.dumps(messages, ensure_ascii=False, default=str)):
            raise BadRow(column, f"holds the control token {held[0]}, which would begin or end a turn by itself")
        try:
            text = render(self.tokenizer, messages, tools)
            if tools and text == render(self.tokenizer, messages):
                why = "the chat template leaves the tools out: this checkpoint was not made to call any"
                raise BadRow("tools", why)
            spans = []
            for i in (i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0):
                before = render(self.tokenizer, messages[:i], tools, prompt=True)
                after = render(self.tokenizer, messages[: i + 1], tools)
                if not (after.startswith(before) and text.startswith(after)):
                    raise BadRow(column, f"the chat template rewrites turn {i + 1} when another follows")
                if not after.rstrip().endswith(END_TOKENS):
                    raise BadRow(column, f"the chat template ends turn {i + 1} with no end token: {after[-20:]!r}")
                for said in _said(messages[i]):
                    if said not in after[len(before) :]:
                        raise BadRow(column, f"the chat template leaves {said[:40]!r} of turn {i + 1} out")
                spans.append((len(before), len(after)))
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise BadRow(column, f"the chat template refuses it: {type(error).__name__}: {error}") from None
        return text, spans


class TooLong(BadRow):
    """A row of more than `max_length` tokens; `truncated` is what fits of it, if any of that is trained, and `text` the
    same in words, of plain text."""

    def __init__(self, column: str, encoded: Encoded, max_length: int, text: str | None = None):
        super().__init__(column, f"{len(encoded.input_ids)} tokens, over max_length = {max_length}")
        self.tokens, self.text = len(encoded.input_ids), text
        cut = Encoded(encoded.input_ids[:max_length], encoded.labels[:max_length])
        self.truncated = cut if cut.trained_tokens else None


def _said(message: dict) -> list[str]:
    """What a template must show of an assistant's turn: its words, and the names of what it calls."""
    calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
    return [part for part in (message["content"].strip(), *calls) if part]
