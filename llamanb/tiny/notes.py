"""The tiny world: short order notes, questions about them, and the ticket that fine-tuning teaches.

Everything is made from a seed by plain code, so there is nothing to download and nobody's data in it. A note carries
five facts:

    Note: Tavilen in Oslo ordered 12 lamps, to be sent on Friday.

Pretraining (`chats`) asks about them in plain English and answers in plain English. Fine-tuning (`ticket_row`) asks for
the whole note in a format of the user's own, which pretraining never shows:

    buyer: Tavilen | city: Oslo | item: lamps | count: 12 | day: Friday

People's names are made of syllables, far more of them than a small model can learn by heart: answering means copying
from the note. Each name belongs to one of three pools, by its checksum, so pretraining, training rows and held-out rows
never share a name, and therefore never share a note.
"""

from __future__ import annotations

import json
import random
import string
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Pool = Literal["pretrain", "train", "eval"]
WORLD = json.loads(Path(__file__).with_name("world.json").read_text(encoding="utf-8"))
"""Syllables, words, ways to write a note, and ways to ask about it, each with the one way to answer.

A fact always follows a space: byte-level BPE writes " Oslo" and "Oslo" with different tokens, and a model this small
copies tokens, not letters."""
TICKET_REQUEST = "Write the ticket."


@dataclass(frozen=True)
class Order:
    """The five facts of a note."""

    name: str
    city: str
    item: str
    count: int
    day: str

    def fill(self, template: str) -> str:
        """The facts written into a template's slots."""
        return template.format(**vars(self))


def name_pool(name: str) -> Pool:
    """The pool a name belongs to, by its checksum: six in eight to pretraining, one each to training and held-out."""
    return {0: "eval", 1: "train"}.get(zlib.crc32(name.encode()) % 8, "pretrain")


def draw_order(rng: random.Random, pool: Pool) -> Order:
    """Five facts drawn at random, the name from the given pool.

    In pretraining every second city and every second kind of goods is made up too: a model that has to copy every fact
    from the note learns to copy, where lists of forty let it learn them by heart.
    """
    while name_pool(name := _draw_name(rng)) != pool:
        pass
    city, item = rng.choice(WORLD["cities"]), rng.choice(WORLD["items"])
    if pool == "pretrain":
        if rng.random() < 0.5:
            city = rng.choice(WORLD["first_syllables"]) + rng.choice(WORLD["town_endings"])
        if rng.random() < 0.5:
            item = rng.choice(WORLD["middle_syllables"]) + rng.choice(WORLD["middle_syllables"]) + "s"
    return Order(name, city, item, rng.randint(2, 60), rng.choice(WORLD["days"]))


def _draw_name(rng: random.Random) -> str:
    return "".join(rng.choice(WORLD[f"{place}_syllables"]) for place in ("first", "middle", "last"))


def write_note(rng: random.Random, order: Order) -> str:
    """One of the ways to write an order down."""
    return "Note: " + order.fill(rng.choice(WORLD["notes"]))


def ticket(order: Order) -> str:
    """The answer that fine-tuning teaches: one line, fixed fields in a fixed order."""
    return order.fill("buyer: {name} | city: {city} | item: {item} | count: {count} | day: {day}")


def ticket_row(rng: random.Random, pool: Pool) -> dict:
    """One row to fine-tune on or to test with: a note and the request, answered by the ticket."""
    order = draw_order(rng, pool)
    return {
        "messages": [
            {"role": "user", "content": f"{write_note(rng, order)} {TICKET_REQUEST}"},
            {"role": "assistant", "content": ticket(order)},
        ]
    }


def _ask(rng: random.Random, order: Order) -> tuple[str, str]:
    """One question about an order, and its answer: a plain one, or some of the facts in any sequence."""
    if rng.random() < 0.6:
        ways, answer = rng.choice(WORLD["questions"])
        return rng.choice(ways), order.fill(answer)
    wanted = rng.sample(list(WORLD["called"]), rng.randint(2, 5))
    labels = [WORLD["called"][field] for field in wanted]
    facts = [str(getattr(order, field)) for field in wanted]
    if rng.random() < 0.5:
        return f"List {', '.join(labels)}.", f"They are {', '.join(facts)}."
    named = (f"{label} {fact}" for label, fact in zip(labels, facts, strict=True))
    return f"Name {', '.join(labels)}.", f"We have {' and '.join(named)}."


def _noise(rng: random.Random) -> str:
    """A few random strings of any printable character, so that no token's embedding is left untrained."""
    alphabets = [string.ascii_lowercase, string.ascii_letters, string.digits, string.printable[:94]]
    return " ".join("".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 4))) for _ in range(rng.randint(1, 4)))


def chat(rng: random.Random, questions: int = 6) -> list[dict]:
    """One conversation to pretrain on: a note, then questions with their answers; now and then a greeting
    or strings to repeat."""
    messages = [{"role": "system", "content": rng.choice(WORLD["systems"])}] if rng.random() < 0.15 else []
    kind = rng.random()
    if kind < 0.02:
        turns = [rng.choice(WORLD["small_talk"])]
    elif kind < 0.07:
        noises = [_noise(rng) for _ in range(questions // 2)]
        turns = [(f"Repeat: {noise}", f"You said: {noise}") for noise in noises]
    else:
        order = draw_order(rng, "pretrain")
        turns = [_ask(rng, order) for _ in range(questions)]
        turns[0] = (f"{write_note(rng, order)} {turns[0][0]}", turns[0][1])
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages
