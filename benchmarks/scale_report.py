"""What `benchmarks.scale` measured, as Markdown: each row, and from how many tokens on several cards pay.

One card's step of T tokens takes T·c + o: `c` a token, `o` the optimizer and what comes once a step. Each of n cards
has T / n of the tokens, the same `o`, and `t` to add gradients up. Shared layers are gathered while the layer before is
computed, so that gathering takes no time of its own from as many tokens a micro-batch on as take a layer that long.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llamanb.architecture import architecture

TIMES = 1.85
"""Times one card's speed that two cards should reach."""
RANK = 16
MIB = 2**20
FORWARD = 1 / 2
"""Of a token's time where nothing is recomputed; back through frozen weights takes as many products as forward."""
BITS = 4.127
"""Of a weight in nf4, its constants quantized too: 4 + 8 / 64 + 32 / (64 · 256)."""


def lines(paths: Sequence[Path]) -> list[dict]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def report(found: list[dict]) -> str:
    header = "row, cards, layers, micro-batches, tokens/s, times one card, adding up, planned GiB, each card's"
    text = [f"| {' | '.join(header.split(', '))} |", "|" + "---|" * 9]
    alone = {line["row"]: line["tokens_s"] for line in found if line["cards"] == 1 and "tokens_s" in line}
    for line in found:
        if "error" not in line and "step_s" not in line:
            continue
        if "error" in line:
            text.append(
                f"| {line['row']} | {line['cards']} | failed: {line['error'].strip().splitlines()[-1][:100]} |"
                + " |" * 6
            )
            continue
        times = f"{line['tokens_s'] / alone[line['row']]:.2f}" if line["row"] in alone else ""
        share = f"{line['adding_up_s'] / line['step_s']:.1%}" if line["cards"] > 1 else ""
        seen = ", ".join(f"{rank['reserved']:.2f}" for rank in line["ranks"])
        batch = f"{line['accumulation']} × {line['micro_batch']}"
        layers = "shared" if line.get("shards", 1) > 1 else "streamed" if line.get("streamed") else "copied"
        layers += ", one alone" if line.get("alone") else ""
        cells = [line["row"], line["cards"], layers, batch, f"{line['tokens_s']:,.0f}", times, share]
        text.append("| " + " | ".join(map(str, [*cells, f"{line['planned']['reserved']:.2f}", seen])) + " |")
    return "\n".join(text) + "\n"


def fitted(seconds: dict[str, float]) -> tuple[float, float]:
    """(seconds of any collective, seconds of each further MiB), through the smallest size and the largest."""
    (small, first), *_, (large, last) = sorted((float(size), taken) for size, taken in seconds.items())
    each = (last - first) / (large - small)
    return first - small * each, each


def split(one: dict, two: dict, tokens: int) -> tuple[float, float]:
    """(seconds a token, seconds once a step) of one card, from steps of so many tokens on one card and on two."""
    rest = two["step_s"] - two["adding_up_s"]
    each = (one["step_s"] - rest) / (tokens / 2)
    return each, rest - each * tokens / 2


def pays(found: list[dict]) -> str:
    """Tables of tokens a card needs, for each link whose collectives were measured."""
    steps = [line for line in found if "step_s" in line]
    rows = {(line["row"], line["cards"]): line for line in steps}
    if len(rows) < len(steps):
        raise ValueError("a row was measured twice with as many cards: give the lines of one machine")
    one, two = rows["8b-2048", 1], rows["8b-2048", 2]
    each, once = split(one, two, round(one["tokens_s"] * one["step_s"]))
    collectives = [line for line in found if (line["row"], line["cards"]) == ("collectives", 2)]
    links = {line["p2p"]: line for line in collectives if "sums_s" in line}
    text = [f"8B on one card: {each * 1e6:.1f} µs a token and {once * 1e3:.0f} ms once a step.", ""]
    text += [
        "| | link | MiB | ms | two cards are 1.85 times one from, tokens a card and step |",
        "|---|---|---|---|---|",
    ]
    size = _adapter_mib("8b")
    begin, mib = fitted(links[True]["sums_s"])
    beside = two["adding_up_s"] - begin - mib * size  # gathering gradients into buckets, and back
    for p2p, line in sorted(links.items(), reverse=True):
        begin, mib = fitted(line["sums_s"])
        taken = beside + begin + mib * size
        needed = (once * (TIMES - 1) + TIMES * taken) / ((2 - TIMES) * each)
        text.append(f"| gradients of rank {RANK} | {_link(p2p)} | {size:.0f} | {taken * 1e3:.1f} | {needed:,.0f} |")
    text += [
        "",
        "| | link | MiB a layer | ms | gathering is hidden from, tokens a micro-batch |",
        "|---|---|---|---|---|",
    ]
    whole = _shape("8b").layers * _weights("8b") + _shape("8b").vocabulary * _shape("8b").hidden
    for model in ("8b", "70b"):
        for p2p, line in sorted(links.items(), reverse=True):
            begin, mib = fitted(line["gathers_s"])
            size = _layer_mib(model)
            forward = each * FORWARD * _weights(model) / whole
            taken = begin + mib * size
            text.append(f"| {model} | {_link(p2p)} | {size:.0f} | {taken * 1e3:.2f} | {taken / forward:,.0f} |")
    return "\n".join(text) + "\n"


def _link(p2p: bool) -> str:
    return "between the cards" if p2p else "through host memory"


def _shape(model: str):
    return architecture({"8b": "meta-llama/Llama-3.1-8B-Instruct", "70b": "meta-llama/Llama-3.3-70B-Instruct"}[model])


def _weights(model: str) -> int:
    """Of a layer's linear weights."""
    shape = _shape(model)
    wide = shape.heads * shape.head_size
    return shape.hidden * (2 * wide + 2 * shape.kv_heads * shape.head_size + 3 * shape.intermediate)


def _layer_mib(model: str) -> float:
    return _weights(model) * BITS / 8 / MIB


def _adapter_mib(model: str) -> float:
    """Of all adapters' gradients, in fp32."""
    shape = _shape(model)
    wide, small = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    ends = 2 * (shape.hidden + wide) + 2 * (shape.hidden + small) + 3 * (shape.hidden + shape.intermediate)
    return ends * RANK * shape.layers * 4 / MIB
