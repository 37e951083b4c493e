"""The table of known cards: what a plan can say of a GPU that nobody has here.

    python -m llamanb.cards                 # prints it
    from llamanb import Card
    Card.known("RTX 4090")

A row holds what NVIDIA publishes and, beside it, what was measured or is an estimate; each card's `source` says which.

* vram_gib: what torch's out-of-memory reports call "total capacity"; where none was found, nominal less 2 %, which the
  reports of other GeForce cards show (9.78 of 10, 11.76 of 12, 23.52 to 23.65 of 24, 31.36 of 32 GiB).
* context_gib: measured on a T4 and an H200 only. Others are estimates between the two, by generation and size.
* tflops: the published dense rate in 16 bits with 32-bit accumulation (GeForce: half of the rate that accumulates in
  16), times the sustained part: SUSTAINED where nobody measured.
* bandwidth_gbs: published; copies reached 0.84 of it on an H200.
* host_link_gbs: 80 % of the PCIe link's nominal rate (an H200 reached 87). launch_us: estimates for the machines that
  such cards stand in (5.8 measured beside an H200).
* attention: FlashAttention and cuDNN's kernel run on 8.0 to 12.1 (aten/src/ATen/native/transformers/cuda/
  sdp_utils.cpp), both with grouped heads (tried on an H200); the memory-efficient one runs on all, never with them.
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from llamanb.card import Card, dotted, grouped_kernels
from llamanb.errors import GpuError
from llamanb.html import Table

SUSTAINED = 0.80
"""Part of the published matrix rate that lasts, an estimate where nobody measured: CUDA-Learn-Notes has 0.88 to 0.96
on an L20, Stas Bekman's ml-engineering (compute/accelerator) 0.87 on an A100 SXM and 0.81 on a PCIe one, best of
shapes."""
HOPPER_SUSTAINED = 0.69
"""683 of 989 TFLOP/s, by `Card.measure` on an H200 at 700 W: bf16, 8192 × 8192 matrices of normal random numbers. What
is in them matters there: Llama's shapes gave 640 to 710 with normal numbers, 780 to 830 with zeros."""
PCIE_X16_GBS = {3: 12.6, 4: 25.2, 5: 50.4}
"""80 % of 15.75 GB/s and its doubles: what copies from pinned memory reach."""
DESKTOP_US, CLOUD_US = 8.0, 15.0
"""Estimates: one launch on a desktop's or a new server's CPU, and on Colab's or Kaggle's shared cores."""


class Row(NamedTuple):
    """A known card, in the units of `Card`."""

    capability: tuple[int, int]
    nominal_gib: float
    vram_gib: float
    context_gib: float
    peak_tflops: float
    bandwidth_gbs: float
    pcie: int
    note: str
    sustained: float = SUSTAINED
    launch_us: float = DESKTOP_US
    lanes: int = 16


_REPORTS = "memory as in out-of-memory reports"
_LESS_2 = "memory: nominal less 2 %"

ROWS = {
    "T4": Row(
        *((7, 5), 16, 14.56, 0.16, 65, 320, 3),
        "datasheet; memory and context measured by users; 24 of 65 TFLOP/s sustained at 70 W (forums.developer.nvidia"
        ".com/t/264462)",
        sustained=24 / 65,
        launch_us=CLOUD_US,
    ),
    "P100": Row(
        *((6, 0), 16, 15.90, 0.30, 9.3, 732, 3),
        f"datasheet, PCIe; no matrix units: cuBLAS adds up in 32 bits at the fp32 rate; {_REPORTS}",
        launch_us=CLOUD_US,
    ),
    "V100 16": Row((7, 0), 16, 15.77, 0.30, 125, 900, 3, "datasheet, SXM2; memory: nominal less 0.23 GiB, unconfirmed"),
    "V100 32": Row((7, 0), 32, 31.74, 0.30, 125, 900, 3, f"datasheet, SXM2; {_REPORTS}"),
    "RTX 2080 Ti": Row((7, 5), 11, 10.76, 0.25, 53.8, 616, 3, f"Turing whitepaper, not confirmed here; {_REPORTS}"),
    "RTX 3060": Row((8, 6), 12, 11.76, 0.30, 25.5, 360, 4, f"twice its 12.7 TFLOP/s in fp32; {_REPORTS}"),
    "RTX 3080 10": Row((8, 6), 10, 9.78, 0.35, 59.5, 760, 4, f"GA102 whitepaper, not confirmed here; {_REPORTS}"),
    "RTX 3080 12": Row((8, 6), 12, 11.76, 0.35, 61.3, 912, 4, f"twice its 30.6 TFLOP/s in fp32; {_LESS_2}"),
    "RTX 3090": Row((8, 6), 24, 23.52, 0.40, 71, 936, 4, f"GA102 whitepaper, not confirmed here; {_LESS_2}"),
    "RTX A6000": Row(
        (8, 6), 48, 47.04, 0.40, 154.8, 768, 4, f"GA102 whitepaper (full rate), not confirmed here; {_LESS_2}"
    ),
    "RTX 4060 Ti 16": Row(
        (8, 9), 16, 15.68, 0.30, 44.1, 288, 4, f"twice its 22.06 TFLOP/s in fp32; {_LESS_2}", lanes=8
    ),
    "RTX 4070": Row((8, 9), 12, 11.76, 0.30, 58.3, 504, 4, f"twice its 29.15 TFLOP/s in fp32; {_LESS_2}"),
    "RTX 4080": Row((8, 9), 16, 15.68, 0.35, 97.5, 717, 4, f"twice its 48.74 TFLOP/s in fp32; {_LESS_2}"),
    "RTX 4090": Row((8, 9), 24, 23.52, 0.45, 165.2, 1008, 4, f"Ada's published rates; {_REPORTS}, the newest driver's"),
    "RTX 5080": Row((12, 0), 16, 15.47, 0.45, 112.6, 960, 5, "Blackwell whitepaper, not confirmed here; memory too"),
    "RTX 5090": Row((12, 0), 32, 31.36, 0.55, 209.5, 1792, 5, f"Blackwell's published rates; {_REPORTS}"),
    "L4": Row(
        *((8, 9), 24, 22.03, 0.35, 121, 300, 4),
        "datasheet; half of the rate is a guess for 72 W; memory: NVML's 23,034 MiB less what an A10's driver keeps",
        sustained=0.5,
        launch_us=CLOUD_US,
    ),
    "A10G": Row((8, 6), 24, 21.99, 0.40, 70, 600, 4, "AWS's variant, rate second-hand; memory as reported of an A10"),
    "L40S": Row((8, 9), 48, 44.40, 0.45, 362, 864, 4, "datasheet; memory as reported of an L40"),
    "A100 40": Row(
        (8, 0), 40, 39.50, 0.50, 312, 1555, 4, f"datasheet; 271 TFLOP/s in ml-engineering; {_REPORTS}", sustained=0.87
    ),
    "A100 80": Row(
        (8, 0),
        80,
        79.25,
        0.50,
        312,
        2039,
        4,
        f"datasheet, SXM; 271 TFLOP/s in ml-engineering; {_REPORTS}",
        sustained=0.87,
    ),
    "H100": Row(
        (9, 0),
        80,
        79.10,
        0.73,
        989,
        3350,
        5,
        "datasheet, SXM; context and sustained part as an H200's; memory: NVML's less 0.55",
        sustained=HOPPER_SUSTAINED,
    ),
    "H100 PCIe": Row(
        (9, 0),
        80,
        79.10,
        0.73,
        756,
        2000,
        5,
        "datasheet, not confirmed here; else as the SXM one",
        sustained=HOPPER_SUSTAINED,
    ),
    "H200": Row(
        (9, 0),
        141,
        139.80,
        0.73,
        989,
        4800,
        5,
        "datasheet; memory, context and rate measured",
        sustained=HOPPER_SUSTAINED,
    ),
}


def _card(name: str, row: Row) -> Card:
    grouped = grouped_kernels(row.capability)
    return Card(
        name=name,
        capability=row.capability,
        vram_gib=row.vram_gib,
        attention=(*grouped[:-1], "memory-efficient", "math"),
        attention_gqa=grouped,
        context_gib=row.context_gib,
        tflops=round(row.peak_tflops * row.sustained, 1),
        bandwidth_gbs=float(row.bandwidth_gbs),
        host_link_gbs=PCIE_X16_GBS[row.pcie] * row.lanes / 16,
        launch_us=row.launch_us,
        source=f"table: {row.note}",
    )


KNOWN = {name: _card(name, row) for name, row in ROWS.items()}
"""Card by name."""


def find(name: str) -> Card:
    """The card of the table that a person means by `name`: "t4", "rtx3090", "NVIDIA GeForce RTX 4090", "A100 80GB".

    Raises:
        GpuError: it is not in the table, or could be two of them.
    """
    wanted = _plain(name) if isinstance(name, str) else ""
    keys = {_plain(known): known for known in KNOWN}
    keys = {f"{_plain(known)}{row.nominal_gib}": known for known, row in ROWS.items()} | keys
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


_FORMS = re.compile(r"\b(nvidia|geforce|tesla|sxm\d?|pcie|hbm\d\w?|\d+ ?gb)\b")


def match(product: str, vram_gib: float) -> Card | None:
    """The card of the table that a driver calls `product` ("NVIDIA A100-SXM4-80GB"); None for laptops, slices and
    every other variant. Of those in several sizes, the one whose memory is within 10 %."""
    full = " ".join(product.lower().removeprefix("nvidia ").split())
    words = {full, " ".join(_FORMS.sub(" ", full.replace("-", " ")).split())}
    if full in map(str.lower, KNOWN):  # "h100 pcie" is a card of its own, "a100 80gb pcie" a form of one
        words = {full}
    for name, card in KNOWN.items():
        plain = name[:-3] if name in _SIZED else name
        if plain.lower() in words and abs(card.vram_gib - vram_gib) < 0.1 * card.vram_gib:
            return card
    return None


_SIZED = [name for name, row in ROWS.items() if name.endswith(f" {row.nominal_gib}")]


def table() -> Table:
    """The known cards, a row each."""
    headers = [
        "card",
        "capability",
        "GiB",
        "for tensors",
        "TFLOP/s",
        "GB/s",
        "from host",
        "computes in",
        "torch",
        "source",
    ]
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
    return Table(
        headers, rows, "Known cards: sustained 16-bit TFLOP/s, GB/s of their memory and from pinned host memory"
    )


if __name__ == "__main__":
    print(table())
