"""What is often said about memory techniques, each judged by what was measured (`tradeoffs.Tradeoffs`: `these`)."""

from __future__ import annotations

import math

from llamanb.tape.workload import ADAPTERS, OPTIMIZER

BASELINE, NOT_FUSED, PADDED, UNPADDED = "baseline", "transformers' layers", "rows, padded", "rows, not padded"
HALF = " at half length"
NOISE, MUCH = 0.05, 0.10
"""Share by which speeds must differ to count as different, and share of the peak that counts as much memory."""


def mib(gib: float) -> str:
    return f"{1024 * gib:,.0f}" if gib > 0.1 else f"{1024 * gib:.1f}"


def _faster(these, one: str, other: str) -> tuple[bool, str]:
    ratio = these.ran(one).speed / these.ran(other).speed
    return ratio > 1 + NOISE, f"{one} has {ratio:.2f} times the speed of {other}"


def _takes(these, one: str, other: str, sign: int) -> tuple[bool, str]:
    """Whether the first peaks much higher (sign 1) or much lower (-1) than the other."""
    size, against = these.ran(one).peak_gib, these.ran(other).peak_gib
    figures = f"{one} peaks at {mib(size)} MiB, {other} at {mib(against)} ({size / against - 1:+.1%})"
    return sign * (size - against) > MUCH * against, figures


def _pages_parameters(these) -> tuple[bool, str]:
    """Whether paging takes more off the peak than the optimizer's states are: torch counts nothing that is paged."""
    paged, plain = these.ran("paged 8-bit AdamW"), these.ran("8-bit AdamW")
    gone, states, adapters = plain.peak_gib - paged.peak_gib, *map(plain.run.buckets_gib.get, (OPTIMIZER, ADAPTERS))
    sizes = f"the optimizer's states are {mib(states)}, adapters {mib(adapters)}, all that lasts"
    return gone > states + adapters / 2, f"the peak falls by {mib(gone)} MiB; {sizes} {mib(plain.lasting_gib)}"


def _square(these, kernel: str, beside: str = "") -> tuple[bool, str]:
    """Whether activations, or what a kernel adds to another's, grow faster than the length to the power of 1.5."""
    rows = [these.ran(kernel + at) for at in (HALF, "")]
    less = [these.ran(beside + at).activations_gib if beside else 0.0 for at in (HALF, "")]
    small, large = (row.activations_gib - other for row, other in zip(rows, less, strict=True))
    if min(small, large) <= 0:
        raise LookupError("the activations are too small to be told from the rest")
    times = rows[1].variant.recipe.max_length / rows[0].variant.recipe.max_length
    what = f"what {kernel} adds to {beside}" if beside else f"activations, {kernel}"
    sizes = f"{mib(small)} MiB, and {mib(large)} at {times:.1f} times the length"
    return math.log(large / small, times) > 1.5, f"{what}: {sizes}, {large / small:.1f} times as much"


def _all_needed(these) -> tuple[bool, str]:
    every = these.ran("recompute all")
    for name in ("keep all", "recompute half"):
        if name in these.rows and "out of memory" in these.rows[name].failed.lower():
            continue
        fits = these.ran(name)
        sizes = f"{mib(fits.reserved_gib)} MiB reserved instead of {mib(every.reserved_gib)}"
        return False, f"{name} fits too: {sizes}, at {fits.speed / every.speed:.2f} times the speed"
    return True, f"with fewer memory ran out; with all, {mib(every.reserved_gib)} MiB are reserved"


CLAIMS = (
    ("int8 is faster than 4-bit", True, lambda these: _faster(these, "int8", NOT_FUSED)),
    ("padding costs speed", True, lambda these: _faster(these, NOT_FUSED, PADDED)),
    ("quantizing to 4 bits costs speed", False, lambda these: _faster(these, "unquantized", "nf4")),
    ("double quantization saves much memory", True, lambda these: _takes(these, "nf4", "single quantization", -1)),
    ("PagedAdamW moves the parameters to host memory", True, _pages_parameters),
    ("PagedAdamW saves much memory", True, lambda these: _takes(these, "paged 8-bit AdamW", "8-bit AdamW", -1)),
    ("activations grow with the square of the length", True, lambda these: _square(these, "memory-efficient")),
    ("they do without a memory-efficient kernel", True, lambda these: _square(these, "math", "memory-efficient")),
    ("gradient accumulation costs speed", False, lambda these: _faster(these, "micro-batch 4", "micro-batch 1")),
    ("all layers must be checkpointed", True, _all_needed),
    ("a higher rank needs much more memory", True, lambda these: _takes(these, "rank times 4", BASELINE, 1)),
)
"""What is said, whether it is about a GPU, and what judges it."""
