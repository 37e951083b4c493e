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

import random
import string
import zlib
from dataclasses import dataclass
from typing import Literal

Pool = Literal["pretrain", "train", "eval"]


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words(
    "Al An Ar Bel Bo Bra Ca Cor Da Del Do El Er Fen Gal Go Ha Hel Is Jo Ka Kel Le Lu Ma Mi Mor Na Nel No Or Pa Per "
    "Ra Rin Ro Sel Ta Tor Ul Va Vin Wil Yo Za Zel"
)
_MIDDLE = _words("ba bi da de di do ga la le li lo ma mi mo na ne ni no ra ri ro sa ta ti to va ve vi")
_LAST = ["", "", "n", "s", "r", "l", "ra", "len", "dor", "mir", "na", "vin", "sha", "tas", "rel", "kan"]
_TOWN = _words("ton by ville ham burg ford stad mouth well dorf")

CITIES = _words(
    "Oslo Lima Rome Paris Cairo Dublin Prague Vienna Lisbon Madrid Athens Berlin Warsaw Helsinki Boston Denver Dallas "
    "Quito Havana Tokyo Seoul Delhi Perth Sydney Nairobi Accra Tunis Dakar Riga Zagreb Geneva Naples Porto Bergen "
    "Toronto Chicago Seattle Austin Bogota Santiago"
)
ITEMS = _words(
    "lamps chairs tables books pens cups plates spoons knives shirts boots hats gloves coats bags boxes bottles jars "
    "candles clocks mirrors carpets pillows blankets brushes hammers nails screws ropes ladders buckets bikes tents "
    "kites drums flutes guitars maps stamps coins apples pears lemons onions carrots tulips roses"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

# A fact always follows a space: byte-level BPE writes " Oslo" and "Oslo" with different tokens, and a model this small
# copies tokens, not letters.
_NOTES = [
    "{name} in {city} ordered {count} {item}, to be sent on {day}.",
    "{name} from {city} wants {count} {item} by {day}.",
    "please send {count} {item} to {name} in {city} on {day}.",
    "on {day} we ship {count} {item} to {name}, {city}.",
    "a call from {city}: {name} needs {count} {item} before {day}.",
    "{count} {item} for {name}, due {day}, to {city}.",
    "by {day}, {name} would like {count} {item} in {city}.",
    "our shop in {city} keeps {count} {item} for {name} until {day}.",
    "{item} again, {count} of them, for {name} in {city}, ready on {day}.",
    "{day} in {city}: {name} picks up {count} {item}.",
    "to {city} on {day}: {count} {item}, paid by {name}.",
    "{name} wrote. {count} {item}, please, to {city}, not later than {day}.",
]

# What can be asked: several ways to ask, the one way to answer.
_QUESTIONS = [
    (["Who is it for?", "Who is the customer?", "Which person is this about?"], "It is for {name}."),
    (["Where does it go?", "Which city is it?", "Where is that?"], "The place is {city}."),
    (["What is it about?", "Which goods are these?", "What do they want?"], "It is about {item}."),
    (["How many are there?", "How many are wanted?", "What is the number?"], "There are {count} of them."),
    (["When is it due?", "Which day is it?", "By when?"], "The day is {day}."),
    (["Who and where?", "Give me the person and the place."], "It is for {name} in {city}."),
    (["What and how many?", "What is the whole order?"], "That is {count} {item}."),
    (["Who and when?", "Who has to be served, and by when?"], "Serve {name} on {day}."),
    (["Where and when?", "Give me the place and the day."], "It is due in {city} on {day}."),
    (["Tell it the short way.", "Sum it up."], "We owe {name} in {city} these {count} {item} on {day}."),
    (["Start with the day.", "Day first, please."], "By {day} we need {count} {item} for {name} in {city}."),
    (["Start with the goods.", "Goods first, please."], "Some {item} for {name}: {count} in {city}, on {day}."),
    (["Start with the place.", "Place first, please."], "In {city} on {day}, {name} gets {count} {item}."),
]
_LABELS = {"name": "person", "city": "place", "item": "goods", "count": "number", "day": "day"}
_SMALL_TALK = [
    ("Hello!", "Hello! Send me a note and ask me about it."),
    ("Who are you?", "I am a tiny Llama. I read short notes and answer questions about them."),
    ("What can you do?", "Send me a note, and I will tell you who, where, what, how many and when."),
    ("Thank you!", "You are welcome."),
    ("Good bye.", "Good bye, and come back soon."),
]
_SYSTEM = ["You answer questions about short notes.", "You are a helpful assistant.", "Read the note, then answer."]
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
    name = _draw_name(rng)
    while name_pool(name) != pool:
        name = _draw_name(rng)
    city, item = rng.choice(CITIES), rng.choice(ITEMS)
    if pool == "pretrain":
        if rng.random() < 0.5:
            city = rng.choice(_FIRST) + rng.choice(_TOWN)
        if rng.random() < 0.5:
            item = rng.choice(_MIDDLE) + rng.choice(_MIDDLE) + "s"
    return Order(name, city, item, rng.randint(2, 60), rng.choice(DAYS))


def _draw_name(rng: random.Random) -> str:
    return rng.choice(_FIRST) + rng.choice(_MIDDLE) + rng.choice(_LAST)


def write_note(rng: random.Random, order: Order) -> str:
    """One of the ways to write an order down."""
    return "Note: " + order.fill(rng.choice(_NOTES))


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
        ways, answer = rng.choice(_QUESTIONS)
        return rng.choice(ways), order.fill(answer)
    wanted = rng.sample(list(_LABELS), rng.randint(2, 5))
    labels = [_LABELS[field] for field in wanted]
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
    messages = [{"role": "system", "content": rng.choice(_SYSTEM)}] if rng.random() < 0.15 else []
    kind = rng.random()
    if kind < 0.02:
        turns = [rng.choice(_SMALL_TALK)]
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
