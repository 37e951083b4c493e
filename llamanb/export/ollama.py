"""An Ollama Modelfile: the chat template in Ollama's own language, worked out from what the tokenizer's gives."""

from __future__ import annotations

from typing import NamedTuple

from llamanb.data.encode import END_TOKENS, render
from llamanb.errors import LlamanbError

_SYSTEM, _USER, _ASSISTANT = "[[the system says]]", "[[the user says]]", "[[the assistant says]]"


class Pieces(NamedTuple):
    """What a chat template puts around what is said; the token that begins a text left out."""

    alone: str
    """Before the first user's turn, where there is no system message."""
    before_system: str
    after_system: str
    user: str
    """Begins a user's turn."""
    user_end: str
    assistant: str
    """Begins an assistant's turn."""
    assistant_end: str


def pieces(tokenizer) -> Pieces | None:
    """None where the template is not made of such pieces."""
    user, assistant = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}
    try:
        with_system = render(tokenizer, [{"role": "system", "content": _SYSTEM}, user], prompt=True)
        text = render(tokenizer, [user, assistant, user], prompt=True)
        start, between, turn, ask = _split(text, _USER, _ASSISTANT, _USER)
        before, after, ask_too = _split(with_system, _SYSTEM, _USER)
        user_end, assistant_begin = _after_end(between)
        assistant_end, user_begin = _after_end(turn)
    except (LlamanbError, ValueError, TypeError, KeyError):
        return None
    bos = tokenizer.bos_token or ""
    same = between == ask == ask_too and start.endswith(user_begin) and after.endswith(user_begin)
    if not same or any(mark in text + with_system for mark in ("{{", "}}", '"""')):
        return None
    return Pieces(
        start.removesuffix(user_begin).removeprefix(bos),
        before.removeprefix(bos),
        after.removesuffix(user_begin),
        user_begin,
        user_end,
        assistant_begin,
        assistant_end,
    )


def modelfile(file: str, tokenizer) -> tuple[str, str]:
    """The Modelfile for a GGUF file that lies beside it, and what a person should know of it, if anything."""
    ends = [token for token in dict.fromkeys((tokenizer.eos_token, *END_TOKENS)) if token in tokenizer.get_vocab()]
    lines, remark = [f"FROM ./{file}"], ""
    if found := pieces(tokenizer):
        lines.append(f'TEMPLATE """{_template(found)}"""')
    else:
        remark = "no TEMPLATE in the Modelfile: the chat template is none that could be written in Ollama's language"
    return "\n".join([*lines, *(f'PARAMETER stop "{end}"' for end in ends), ""]), remark


def _template(made: Pieces) -> str:
    return (
        f"{{{{ if .System }}}}{made.before_system}{{{{ .System }}}}{made.after_system}"
        f"{{{{ else }}}}{made.alone}{{{{ end }}}}"
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{made.user}{{{{ .Content }}}}{made.user_end}'
        f'{{{{ else if eq .Role "assistant" }}}}{made.assistant}{{{{ .Content }}}}{made.assistant_end}'
        f"{{{{ end }}}}{{{{ end }}}}{made.assistant}"
    )


def _split(text: str, *marks: str) -> list[str]:
    """What stands before, between and after the marks. Raises ValueError where one is missing."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            raise ValueError(mark)
        parts.append(part)
    return [*parts, text]


def _after_end(text: str) -> tuple[str, str]:
    """Up to the end of a turn, and what begins the next. Raises ValueError where no turn ends."""
    at = min(text.index(end) + len(end) for end in END_TOKENS if end in text)
    return text[:at], text[at:]
