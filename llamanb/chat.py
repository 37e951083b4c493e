"""Talking to a model, with its adapter on or off: a conversation that is kept, and free-form answers side by side."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from llamanb.data.encode import control_tokens, render
from llamanb.errors import LlamanbError, RecipeError
from llamanb.generate import LONGEST_ANSWER, asked, generate, settings
from llamanb.html import Table, visible

ON, OFF = "with the adapter", "without it"


class ChatError(LlamanbError):
    """Something that cannot be said, or not be answered here."""


class Chat:
    """A conversation with a model. Prints as who said what, and shows as a table in a notebook.

    Args:
        model: as `load_adapter` returns; any model of transformers that generates.
        tokenizer: its tokenizer, with a chat template.
        system: what the model is told before the first turn.
        adapter: whether the adapter answers; may be set between two turns. Of no effect where there is none.
        temperature: 0 takes the likeliest token each time; above it, tokens are drawn.
        seed: of what is drawn.
        max_new_tokens: an answer's tokens, at most.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        system: str = "",
        adapter: bool = True,
        temperature: float = 0.0,
        seed: int = 0,
        max_new_tokens: int = LONGEST_ANSWER,
    ):
        if temperature < 0:
            raise RecipeError(f"temperature = {temperature}", "it cannot be below 0", "temperature = 0.7, or 0")
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.adapter, self.temperature, self.seed, self.max_new_tokens = adapter, temperature, seed, max_new_tokens
        self.has_adapter = hasattr(model, "disable_adapter")
        self.messages: list[dict[str, str]] = []
        """What was said, without the system's message."""
        self.forgotten = 0
        """Of the messages, how many the last answer was given without: the oldest, where all did not fit."""
        self._answered_by: list[str] = []
        self._busy, self._stop = threading.Lock(), threading.Event()

    def say(self, text: str, heard: Callable[[str], None] | None = None) -> str:
        """The model's answer to the next turn.

        Args:
            text: the user's turn.
            heard: called with what has come of the answer, each time that there is more.

        Raises ChatError where the text is empty or holds control tokens, while another answer is being given, and where
        even the last turn alone does not fit. Then, and where it is interrupted, nothing is kept of the turn.
        """
        if not self._busy.acquire(blocking=False):
            raise ChatError("an answer is being given", "one at a time", "stop it, or wait")
        try:
            self._stop.clear()
            self._check(text)
            turn = {"role": "user", "content": text}
            answer = self._answer([*self.messages, turn], heard or (lambda piece: None))
            self.messages += [turn, {"role": "assistant", "content": answer}]
            self._answered_by.append(ON if self.adapter and self.has_adapter else OFF if self.has_adapter else "model")
            return answer
        finally:
            self._busy.release()

    def stop(self) -> None:
        """Ends the answer that is being given, from another thread; what came of it is kept."""
        self._stop.set()

    def clear(self) -> None:
        """Begins anew."""
        self.messages, self._answered_by, self.forgotten = [], [], 0

    def _check(self, text: str) -> None:
        if not text.strip():
            raise ChatError("there is nothing to answer", "the turn is empty", "write something")
        if held := control_tokens(self.tokenizer).search(text):
            fix = "leave it out: it would begin or end a turn by itself"
            raise ChatError("this cannot be said", f"it holds the control token {held[0]}", fix)

    def _answer(self, messages: list[dict[str, str]], heard: Callable[[str], None]) -> str:
        """With as many of the last turns as fit the model's positions and the memory."""
        from llamanb.attempts import attempt

        system = [{"role": "system", "content": self.system}] if self.system else []
        room = self.model.config.max_position_embeddings - self.max_new_tokens

        def of_the_last(count: int) -> str:
            prompt = render(self.tokenizer, [*system, *messages[-count:]], prompt=True)
            ids = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
            fewer = count - 2
            if ids.shape[1] > room:
                if fewer < 1:
                    raise ChatError(
                        f"this turn is {ids.shape[1]:,} tokens long",
                        f"the model has {room + self.max_new_tokens:,} positions, {self.max_new_tokens} for the answer",
                        "say less, or take a smaller max_new_tokens",
                    )
                return of_the_last(fewer)
            said = attempt(
                lambda: self._said(ids, heard), lambda error: (lambda: of_the_last(fewer)) if fewer > 0 else None
            )
            self.forgotten = max(self.forgotten, len(messages) - count)
            return said

        self.forgotten = 0
        return of_the_last(len(messages))

    def _said(self, ids, heard: Callable[[str], None]) -> str:
        import torch
        from transformers import StoppingCriteriaList

        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            heard("".join(pieces))

        ids = ids.to(self.model.device)
        mode = self.model.disable_adapter() if self.has_adapter and not self.adapter else contextlib.nullcontext()
        cuda = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=cuda), mode:
            torch.manual_seed(self.seed + len(self.messages))
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=_streamer(self.tokenizer, take),
                stopping_criteria=StoppingCriteriaList([lambda *_: self._stop.is_set()]),
                **settings(self.tokenizer, self.max_new_tokens, self.temperature),
            )
        return "".join(pieces).strip()

    def _table(self) -> Table:
        who = iter(self._answered_by)
        rows = [[next(who) if m["role"] == "assistant" else "you", m["content"]] for m in self.messages]
        return Table(["who", "what"], rows)

    def __str__(self) -> str:
        said = "\n\n".join(f"{who}: {what}" for who, what in self._table().rows)
        return visible(said) or "nothing has been said"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()


def _streamer(tokenizer, take: Callable[[str], None]):
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        """transformers' own, which waits with half a word or character until the rest has come."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            take(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)


def side_by_side(
    model,
    tokenizer,
    questions: list[str],
    *,
    temperature: float = 0.7,
    seed: int = 0,
    max_new_tokens: int = LONGEST_ANSWER,
) -> Table:
    """Free-form answers without the adapter and with it: the same questions, the same seed. One that became too long
    ends in an ellipsis.

    Args:
        model: with an adapter, as `load_adapter` returns; after full fine-tuning there is nothing to compare it with.
        questions: asked one by one in the chat format, each a conversation of its own.
        temperature: 0 takes the likeliest token each time; above it, tokens are drawn.

    Raises RecipeError where there is no question, and for a temperature below 0.
    """
    if not questions or temperature < 0:
        why = "no question" if not questions else f"temperature = {temperature}"
        raise RecipeError("nothing can be answered", why, "questions = ['...'], and a temperature of 0 or more")
    prompts = [asked(tokenizer, question) for question in questions]
    modes = {"answer": contextlib.nullcontext}
    if hasattr(model, "disable_adapter"):
        modes = {"without the adapter": model.disable_adapter, "with it": contextlib.nullcontext}
    columns = {}
    for words, mode in modes.items():
        with mode():
            found = generate(model, tokenizer, prompts, max_new_tokens, temperature=temperature, seed=seed)
        columns[words] = [one.text if one.ended else f"{one.text} …" for one in found]
    how = f"temperature {temperature:g}, seed {seed}" if temperature else "the likeliest token each time"
    return Table(["question", *columns], list(zip(questions, *columns.values(), strict=True)), how)
