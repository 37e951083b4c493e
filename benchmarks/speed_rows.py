"""What `benchmarks.speed` measures: rows, who takes part in each, and the committed grid of Unsloth's settings. Plain
data, without torch.

A contestant is written as on the command line, `stack:option=value,...`:

    llamanb                                 its own plan, for the row's card
    llamanb:micro=2,stored=20               a plan with 2 rows at once whose last 20 layers are kept, the others again
    llamanb:micro=1,stored=4,halved=8,again=offloaded     the last 4 kept, 8 before them but for the MLP's
    llamanb:speeds=here                     planned for the speed of the GPU that is there, not of the pretended card
    llamanb:rehearse=1   llamanb:fused=0   llamanb:checkpointing=all      rehearsed; not fused; any field of Recipe
    trl                                     as it comes
    unsloth:micro=2,checkpointing=unsloth   Unsloth; checkpointing is off, on, unsloth, or auto (see MODES)
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

MODELS = {
    "1b": "meta-llama/Llama-3.2-1B-Instruct",
    "3b": "meta-llama/Llama-3.2-3B-Instruct",
    "8b": "meta-llama/Llama-3.1-8B-Instruct",
}
EFFECTIVE, RANK, OPTIMIZER = 8, 16, "paged_adamw_8bit"
GRID_ROWS = (1, 2, 4, 8, 16)
"""Micro-batches of Unsloth's grid; one of 16 rows is an optimizer step of 16."""
MOST_TOKENS = 32768
"""Tokens of the largest micro-batch of the grid: 8 rows of 4,096, and every larger one is as full a GPU."""
MODES = ("unsloth", "on", "off")
"""Unsloth's checkpointing: offloaded to the host ("unsloth", its notebooks' choice), plain, none. Beyond the grid there
is `auto`: "unsloth" with its option checkpoint_skip_layers="auto", which after the first step keeps what fits."""
NOTEBOOK_ROWS = 2
"""Micro-batch of Unsloth's own notebooks, with "unsloth" checkpointing."""
PADDED_ROWS = (8, 4, 2, 1)
"""Micro-batches of trl on rows of uneven length, which it pads to the longest of each."""
REAL = Path(__file__).parent / "grids" / "instruction_rows.json"


@dataclass(frozen=True)
class Row:
    """One shape of training that all contestants run."""

    id: str
    model: str
    length: int
    """Tokens of every row; of the longest, where `lengths` says how long the others are."""
    card: str = ""
    """Known card that the GPU pretends to be; empty: all of the GPU."""
    micro: int | None = None
    """Rows at once; None: each contestant's own."""
    grid: bool = False
    """Whether Unsloth's whole grid is searched; otherwise its checkpointing is, with `micro` rows."""
    lengths: str = ""
    """File of real rows' lengths, of which rows are drawn (`drawn`); empty: all are of `length`."""


ROWS = {  # the most important ones first
    row.id: row
    for row in [
        *(Row(f"16gb-{length}", "8b", length, card="T4", grid=True) for length in (2048, 1024, 512, 4096)),
        Row("8b-2x2048", "8b", 2048, micro=2),
        Row("1b-4x512", "1b", 512, micro=4, grid=True),
        Row("8b-4x512", "8b", 512, micro=4),
        Row("1b-2x2048", "1b", 2048, micro=2, grid=True),
        Row("3b-2x2048", "3b", 2048, micro=2),
        Row("3b-4x512", "3b", 512, micro=4),
        *(Row(f"rows-{model}", model, 1328, card="T4", lengths=str(REAL)) for model in ("8b", "1b")),
    ]
}
DRY = {
    row.id: row
    for row in [
        Row("dry-64", "tiny", 64, micro=2),
        Row("dry-128", "tiny", 128, grid=True),
        Row("dry-rows", "tiny", 128, lengths=str(REAL)),
    ]
}
"""For a look at all the moving parts on a CPU, with the tiny Llama's shape."""


def real_rows(path: str | Path) -> list[tuple[int, int]]:
    """(tokens, of them trained) of each row in a file such as REAL: {"rows": [[151, 87], ...]}."""
    return [tuple(row) for row in json.loads(Path(path).read_text(encoding="utf-8"))["rows"]]


def drawn(session: dict) -> list[tuple[int, int]]:
    """(tokens, of them trained) of a session's rows, the same for every stack: each of the full length, or drawn by
    seed from the file of lengths, the longer ones cut."""
    length, count = session["length"], session["rows"]
    if not session.get("lengths"):
        return [(length, length)] * count
    found = random.Random(0).choices(real_rows(session["lengths"]), k=count)
    return [(min(length, tokens), max(1, trained - max(0, tokens - length))) for tokens, trained in found]


@dataclass(frozen=True)
class Contestant:
    """A stack and its options."""

    stack: str
    options: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        return self.stack + (":" if self.options else "") + ",".join(f"{k}={v}" for k, v in self.options.items())

    @property
    def micro(self) -> int | None:
        return int(self.options["micro"]) if self.options.get("micro", "plan") != "plan" else None

    @property
    def mode(self) -> str:
        """Unsloth's checkpointing."""
        return self.options.get("checkpointing", "unsloth")


STACKS = ("llamanb", "trl", "unsloth")


def contestant(text: str) -> Contestant:
    """Raises ValueError for what is no contestant."""
    stack, _, options = text.partition(":")
    pairs = [pair.partition("=") for pair in options.split(",") if pair]
    if stack not in STACKS or any(not value for _, _, value in pairs):
        raise ValueError(f"{text!r} is no contestant: {', '.join(STACKS)}, then option=value, ... after a colon")
    return Contestant(stack, {name.strip(): value.strip() for name, _, value in pairs})


def unsloth(micro: int, mode: str) -> Contestant:
    return Contestant("unsloth", {"micro": str(micro), "checkpointing": mode})


def rows(text: str) -> list[Row]:
    """Rows by ids or beginnings of ids, separated by commas, in the order given: "16gb", "8b-2x2048,1b"; "all" of them.

    Raises ValueError for a name that begins none.
    """
    every = ROWS | DRY
    found: list[Row] = []
    for name in text.split(","):
        these = list(ROWS.values()) if name == "all" else [row for id_, row in every.items() if id_.startswith(name)]
        if not these:
            raise ValueError(f"no row begins with {name!r}; there are: {', '.join(every)}")
        found += [row for row in these if row not in found]
    return found


def grid(row: Row) -> list[Contestant]:
    """Settings of Unsloth to look through for the row's best: by checkpointing, small micro-batches first. None on rows
    of uneven length, where padded batches are what is compared with."""
    if row.lengths:
        return []
    if not row.grid:
        return [unsloth(row.micro, mode) for mode in MODES]
    return [unsloth(micro, mode) for mode in MODES for micro in GRID_ROWS if micro * row.length <= MOST_TOKENS]


def standing(row: Row) -> list[Contestant]:
    """Who takes part whatever the grid says. On a row of the whole GPU llamanb runs with the row's micro-batch, and
    where the grid is searched with its own choice too; on rows of uneven length trl takes part with every
    micro-batch."""
    if row.lengths:
        return [Contestant("llamanb"), *(Contestant("trl", {"micro": str(micro)}) for micro in PADDED_ROWS)]
    if row.micro is None:
        return [Contestant("llamanb"), unsloth(NOTEBOOK_ROWS, "unsloth"), Contestant("trl")]
    own = [Contestant("llamanb", {"micro": "plan"})] if row.grid else []
    return [Contestant("llamanb"), *own, Contestant("trl")]


def same_shape(row: Row, one: Contestant) -> bool:
    """Whether a contestant runs with the row's own micro-batch."""
    return row.micro is None or one.options.get("micro", str(row.micro)) == str(row.micro)
