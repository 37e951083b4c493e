"""Row formats: which one a file is in is seen from its columns, and each becomes the same Example."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from llamanb.data.read import BadRow, Row
from llamanb.errors import DataError

SQUAD = "SQuAD"
"""Name of the format whose answers are scored as SQuAD's own script does."""
UNANSWERABLE = "unanswerable"
"""What the model is taught to say where SQuAD v2's context holds no answer."""


@dataclass(frozen=True)
class Example:
    """One conversation, or one plain text, ready for the chat template."""

    place: str
    column: str
    """Where in the row what is trained on stands; errors name it."""
    messages: list[dict] = field(default_factory=list)
    tools: list[dict] | None = None
    text: str | None = None
    """Plain text, where there are no messages."""
    references: tuple[str, ...] = ()
    """Right answers for scoring; empty where the last assistant turn is the only one."""

    @property
    def prompt_key(self) -> str:
        """Equal for rows that ask the same: such rows never stand on both sides of the split."""
        last = max((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), default=0)
        return self.text if self.text is not None else json.dumps(self.messages[:last], sort_keys=True)


class Format(NamedTuple):
    name: str
    columns: tuple[str, ...]
    convert: Callable[[Row], list[Example]]


def detect(rows: list[Row], source: str) -> Format:
    """The format whose columns the rows have. Raises DataError listing the columns found and the formats known."""
    columns = list(rows[0].values)
    for candidate in FORMATS:
        if set(candidate.columns) <= set(columns):
            return candidate
    known = "; ".join(f"{f.name}: {', '.join(f.columns)}" for f in FORMATS)
    raise DataError(
        f"{source}, {rows[0].place}: no known format has the columns {', '.join(map(repr, columns)) or '(none)'}",
        f"known are {known}",
        "rename the columns to those of one format",
    )


def _text(row: Row, column: str, *, may_be_empty: bool = False) -> str:
    value = row.values.get(column)
    if value is None:
        raise BadRow(column, "is null" if column in row.values else "is missing")
    if not isinstance(value, str):
        raise BadRow(column, f"is a {type(value).__name__}, not text")
    if not value.strip() and not may_be_empty:
        raise BadRow(column, "is empty")
    return value


def _list(row: Row, column: str) -> list:
    """A list, also where it came as JSON text in a CSV cell."""
    value = row.values.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow(column, "is text, and not a JSON list") from None
    if not isinstance(value, list):
        raise BadRow(column, "is null" if value is None else f"is a {type(value).__name__}, not a list")
    if not value:
        raise BadRow(column, "is an empty list")
    return value


def _pair(row: Row, column: str, prompt: str, answer: str, references: tuple[str, ...] = ()) -> list[Example]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return [Example(row.place, column, messages, references=references or (answer,))]


def _alpaca(row: Row) -> list[Example]:
    prompt = _text(row, "instruction")
    if row.values.get("input") is not None:
        extra = _text(row, "input", may_be_empty=True).strip()
        prompt += f"\n\n{extra}" if extra else ""
    return _pair(row, "output", prompt, _text(row, "output"))


def _seed_task(row: Row) -> list[Example]:
    """Self-Instruct's seed tasks: an instruction with several instances, each of them a row."""
    examples = []
    for i, instance in enumerate(_list(row, "instances")):
        if not isinstance(instance, dict):
            raise BadRow("instances", f"entry {i + 1} is a {type(instance).__name__}, not an object")
        examples += _alpaca(Row(f"{row.place}, instance {i + 1}", {**row.values, **instance}))
    return examples


def _squad(row: Row) -> list[Example]:
    context, question = _text(row, "context"), _text(row, "question")
    texts = row.values.get("answers")
    if isinstance(texts, dict):  # the Hub's layout: {"text": [...], "answer_start": [...]}
        texts = texts.get("text")
    elif isinstance(texts, list):  # the official layout: [{"text": ..., "answer_start": ...}, ...]
        texts = [answer.get("text") if isinstance(answer, dict) else None for answer in texts]
    if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
        raise BadRow("answers", "holds no list of answer texts")
    prompt = (
        "Answer the question with words from the context. "
        f'If the context does not hold the answer, say "{UNANSWERABLE}".\n\n'
        f"Context: {context}\n\nQuestion: {question}"
    )
    references = tuple(dict.fromkeys(texts)) or (UNANSWERABLE,)
    return _pair(row, "answers", prompt, references[0], references)


def _prompt_completion(row: Row) -> list[Example]:
    if isinstance(row.values.get("prompt"), list) and isinstance(row.values.get("completion"), list):
        turns = _list(row, "prompt") + _list(row, "completion")
        return _conversation(row, "completion", turns, "role", "content")
    return _pair(row, "completion", _text(row, "prompt"), _text(row, "completion"))


def _plain(row: Row) -> list[Example]:
    return [Example(row.place, "text", text=_text(row, "text"))]


def _messages(row: Row) -> list[Example]:
    return _conversation(row, "messages", _list(row, "messages"), "role", "content")


def _sharegpt(row: Row) -> list[Example]:
    turns = _list(row, "conversations")
    if isinstance(turns[0], dict) and "role" in turns[0]:  # chat messages under ShareGPT's name
        return _conversation(row, "conversations", turns, "role", "content")
    system = row.values.get("system")
    if isinstance(system, str) and system.strip():
        turns = [{"from": "system", "value": system}, *turns]
    return _conversation(row, "conversations", turns, "from", "value")


_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant"}
_ROLES |= {"gpt": "assistant", "bot": "assistant", "model": "assistant"}
_ROLES |= dict.fromkeys(("tool", "ipython", "function", "observation", "function_response"), "tool")


def _conversation(row: Row, column: str, turns: list, role_key: str, content_key: str) -> list[Example]:
    messages = [_message(turn, i, column, role_key, content_key) for i, turn in enumerate(turns, 1)]
    roles = [m["role"] for m in messages]
    answers = [m for m in messages if m["role"] == "assistant" and m.get("weight") != 0]
    if not answers:
        raise BadRow(column, "has no assistant turn: there is nothing to learn from")
    if "system" in roles[1:]:
        raise BadRow(column, f"turn {roles.index('system', 1) + 1} is a system turn; only the first can be")
    first = roles.index("assistant")
    if "user" not in roles[:first]:
        raise BadRow(column, f"turn {first + 1} is the assistant's, and no user has said anything before it")
    tools = row.values.get("tools")
    tools = _list(row, "tools") if tools and tools != "[]" else None
    references = () if "tool_calls" in answers[-1] else (answers[-1]["content"],)  # a call is not scored as text
    return [Example(row.place, column, messages, tools, references=references)]


def _message(turn: object, number: int, column: str, role_key: str, content_key: str) -> dict:
    if not isinstance(turn, dict):
        raise BadRow(column, f"turn {number} is a {type(turn).__name__}, not an object")
    role = _ROLES.get(turn.get(role_key)) if isinstance(turn.get(role_key), str) else None
    if role is None:
        raise BadRow(column, f"turn {number} has {role_key!r} = {turn.get(role_key)!r}; known: {', '.join(_ROLES)}")
    content, calls = turn.get(content_key), turn.get("tool_calls")
    kept = {"role": role} | ({"weight": 0} if turn.get("weight") == 0 else {})  # chat services: not to be learned
    if isinstance(content, list):  # parts, as chat services write them
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise BadRow(column, f"turn {number} has parts that are not text; images and sound are not trained on")
        content = "".join(part["text"] for part in content)
    if calls:
        return {**kept, "content": content or "", "tool_calls": _calls(calls, f"turn {number}", column)}
    if not isinstance(content, str):
        kind = "null or missing" if content is None else f"a {type(content).__name__}, not text"
        raise BadRow(column, f"turn {number} ({role}): {content_key!r} is {kind}")
    if not content.strip() and role == "assistant":
        raise BadRow(column, f"turn {number} (assistant) is empty: there is nothing to learn from")
    return {**kept, "content": content}


def _calls(calls: object, turn: str, column: str) -> list[dict]:
    """Tool calls with their arguments as objects: chat services write them as JSON text, and a template would quote
    that text once more."""
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(column, f"{turn} has a tool call without a function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments or "{}")
        if not isinstance(arguments, dict):
            raise BadRow(column, f"{turn} calls {function['name']!r} with arguments that are no JSON object")
        read.append({"type": "function", "function": {**function, "arguments": arguments}})
    return read


FORMATS = (
    Format("chat messages", ("messages",), _messages),
    Format("ShareGPT", ("conversations",), _sharegpt),
    Format(SQUAD, ("context", "question", "answers"), _squad),
    Format("Alpaca", ("instruction", "output"), _alpaca),
    Format("Self-Instruct seed tasks", ("instruction", "instances"), _seed_task),
    Format("prompt and completion", ("prompt", "completion"), _prompt_completion),
    Format("plain text", ("text",), _plain),
)
