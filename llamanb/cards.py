"""The table of known cards: what a plan can say of a GPU that nobody has here.

    python -m llamanb.cards                 # prints it
    from llamanb import Card
    Card.known("RTX 4090")

cards.csv holds what NVIDIA publishes and, beside it, what was measured or is an estimate; `source` says which.

* vram_gib: what torch's out-of-memory reports call "total capacity"; where none was found, nominal less 2 %, which the
  reports of other GeForce cards show (9.78 of 10, 11.76 of 12, 23.52 to 23.65 of 24, 31.36 of 32 GiB).
* context_gib: measured on a T4 and an H200 only. Others are estimates between the two, by generation and size.
* peak_tflops: the published dense rate in 16 bits with 32-bit accumulation (GeForce: half of the rate that accumulates
  in 16).
* sustained: the part of it that lasts, 0.8 where nobody measured: CUDA-Learn-Notes has 0.88 to 0.96 on an L20, Stas
  Bekman's ml-engineering (compute/accelerator) 0.87 on an A100 SXM and 0.81 on a PCIe one, best of shapes. Hopper's
  0.69 is 683 of 989 TFLOP/s by `Card.measure` on an H200 at 700 W: bf16, 8192 × 8192 matrices of normal random numbers.
  What is in them matters there: Llama's shapes gave 640 to 710 with normal numbers, 780 to 830 with zeros.
* bandwidth_gbs: published; copies reached 0.84 of it on an H200.
* host_link_gbs: 80 % of the PCIe link's nominal rate, which is 15.75 GB/s for 16 lanes of the third generation and
  doubles with each (an H200 reached 87).
* multiprocessors: published.
* launch_us: estimates for the machines that such cards stand in, 8 on a desktop or a new server (5.8 measured beside an
  H200), 15 on Colab's or Kaggle's shared cores.

Attention: FlashAttention and cuDNN's kernel run on 8.0 to 12.1 (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp),
both with grouped heads (tried on an H200); the memory-efficient one runs on all, never with them.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from llamanb.card import Card, grouped_kernels
from llamanb.errors import GpuError
from llamanb.html import Table
from llamanb.precision import dotted

with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
    ROWS = {row["name"]: row for row in csv.DictReader(file)}
"""cards.csv by name, as text."""


def _card(row: Mapping[str, str]) -> Card:
    capability = tuple(map(int, row["capability"].split(".")))
    grouped = grouped_kernels(capability)
    as_they_stand = ("vram_gib", "context_gib", "bandwidth_gbs", "host_link_gbs", "launch_us")
    return Card(
        name=row["name"],
        capability=capability,
        attention=(*grouped[:-1], "memory-efficient", "math"),
        attention_gqa=grouped,
        tflops=round(float(row["peak_tflops"]) * float(row["sustained"]), 1),
        multiprocessors=int(row["multiprocessors"]),
        source=f"table: {row['source']}",
        **{field: float(row[field]) for field in as_they_stand},
    )


KNOWN = {name: _card(row) for name, row in ROWS.items()}
"""Card by name."""
_SIZED = [name for name, row in ROWS.items() if name.endswith(f" {row['nominal_gib']}")]
"""Those that come in several sizes, and say theirs at the end."""


def find(name: str) -> Card:
    """The card of the table that a person means by `name`: "t4", "rtx3090", "NVIDIA GeForce RTX 4090", "A100 80GB".

    Raises:
        GpuError: it is not in the table, or could be two of them.
    """
    wanted = _plain(name) if isinstance(name, str) else ""
    keys = {_plain(known): known for known in KNOWN}
    keys = {f"{_plain(known)}{row['nominal_gib']}": known for known, row in ROWS.items()} | keys
    keys |= {plain.removeprefix("rtx"): known for plain, known in keys.items()}
    if wanted in keys:
        return KNOWN[keys[wanted]]
    sizes = [known for known in _SIZED if wanted in (plain := _plain(known)[:-2], plain.removeprefix("rtx"))]
    near = difflib.get_close_matches(wanted, keys, n=3, cutoff=0.6) if not sizes else ()
    names = list(dict.fromkeys(sizes or [keys[key] for key in near])) or list(KNOWN)
    raise GpuError(
        f"no card called {str(name)[:60]!r} in the table",
        f"There is: {', '.join(names)}." if sizes or not near else f"The nearest names: {', '.join(names)}.",
        "Take one of them (`print(llamanb.cards.table())` lists all), or write one: Card(name=..., capability=(8, 6), "
        "vram_gib=11.76).",
    )


def _plain(name: str) -> str:
    """Letters and digits of a name, without who made it and what its memory is counted in."""
    words = re.sub(r"\b(nvidia|geforce|tesla)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]", "", re.sub(r"(?<=\d)\s*gi?b\b", "", words))


def match(product: str, vram_gib: float) -> Card | None:
    """The card of the table that a driver calls `product` ("NVIDIA A100-SXM4-80GB"); None for laptops, slices and
    every other variant. Of those in several sizes, the one whose memory is within 10 %."""
    bare = re.sub(r"\b(sxm\d?|pcie|hbm\d\w?|\d+ ?gb)\b", " ", product.lower().replace("-", " "))
    for said in map(_plain, (product, bare)):  # "h100 pcie" is a card of its own, "a100 80gb pcie" a form of one
        for name, card in KNOWN.items():
            plain = _plain(name[:-3] if name in _SIZED else name)
            if plain == said and abs(card.vram_gib - vram_gib) < 0.1 * card.vram_gib:
                return card
    return None


def table() -> Table:
    """The known cards, a row each."""
    headers = ("card", "capability", "GiB", "for tensors", "TFLOP/s", "GB/s", "from host", "computes in", "torch")
    rows = [
        [
            name,
            dotted(card.capability),
            f"{card.vram_gib:.2f}",
            f"{card.free_gib:.2f}",
            f"{card.tflops:.0f}",
            f"{card.bandwidth_gbs:.0f}",
            f"{card.host_link_gbs:.1f}",
            card.dtype,
            "default" if card.runs_default_torch else "CUDA 12.6",
            card.source.removeprefix("table: "),
        ]
        for name, card in KNOWN.items()
    ]
    caption = "Known cards: sustained 16-bit TFLOP/s, GB/s of their memory and from pinned host memory"
    return Table((*headers, "source"), rows, caption)


if __name__ == "__main__":
    print(table())
