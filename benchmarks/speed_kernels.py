"""What a profiled step's GPU events say: how long any kernel ran, and how long a T4 would take for them. No torch.

An event is (name, start, duration), in nanoseconds. Events overlap where a stack uses several streams, so busy time is
the union of their intervals and not their sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

MATRIX, OTHER, WITHIN, LINK = "matrix", "other", "within", "link"
"""Kinds of event: products of matrices, every other kernel, copies and fills inside the GPU's memory, copies to and
from the host."""
KINDS = (MATRIX, OTHER, WITHIN, LINK)
_PRODUCTS = ("gemm", "gemv", "cutlass", "nvjet", "xmma", "fmha", "flash_", "sdpa", "cudnn_generated", "_cce_", "s16816")
"""Parts of names: cuBLAS (gemm, nvjet, xmma), CUTLASS, attention of torch (fmha, flash_) and of cuDNN, the losses of
cut-cross-entropy. Attention counts as products: its arithmetic is what takes its time."""
_NO_PRODUCTS = ("splitkreduce", "dot_do_o", "convert_dq", "dequant")
"""Parts of names of kernels that belong to products and only move bytes."""


class Event(NamedTuple):
    name: str
    start_ns: int
    duration_ns: int


def kind_of(name: str) -> str:
    """The kind of an event, by the name that CUPTI gives it."""
    low = name.lower()
    if "memcpy" in low:  # "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoD (Device -> Device)", "Unified Memory Memcpy"
        return LINK if "htod" in low or "dtoh" in low else WITHIN
    if low.startswith(("memset", "[memset", "memory set")):
        return WITHIN
    if low.startswith("triton_"):  # Inductor names a kernel after every operation fused into it, attention's too
        return MATRIX if low.startswith("triton_tem") else OTHER
    if any(part in low for part in _NO_PRODUCTS):
        return OTHER
    return MATRIX if any(part in low for part in _PRODUCTS) else OTHER


def union_ns(intervals: Iterable[tuple[int, int]]) -> int:
    """Length of the union of (start, duration) intervals."""
    total, end = 0, None
    for start, duration in sorted(intervals):
        stop = start + duration
        if end is None or start >= end:
            total, end = total + duration, stop
        elif stop > end:
            total, end = total + stop - end, stop
    return total


def summary(events: Iterable[Event], top: int = 12) -> dict:
    """Seconds by kind (sums), busy seconds (unions), and the kernels that took longest.

    `busy_s`: any kernel runs, copies apart. `active_s`: a kernel, or a copy or fill within the GPU's memory.
    """
    sums = dict.fromkeys(KINDS, 0)
    kernels, within = [], []
    by_name: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in events:
        kind = kind_of(event.name)
        sums[kind] += event.duration_ns
        by_name[event.name] += event.duration_ns
        count[event.name] += 1
        if kind in (MATRIX, OTHER):
            kernels.append(event[1:])
        elif kind == WITHIN:
            within.append(event[1:])
    return {
        **{f"{kind}_s": round(total / 1e9, 6) for kind, total in sums.items()},
        "busy_s": round(union_ns(kernels) / 1e9, 6),
        "active_s": round(union_ns(kernels + within) / 1e9, 6),
        "kernels": len(kernels),
        "top": [
            [name[:90], kind_of(name), round(total / 1e6, 3), count[name]] for name, total in by_name.most_common(top)
        ],
    }


class Ratios(NamedTuple):
    """How many times longer a T4 takes for each kind of work than the GPU that was measured."""

    matrix: float
    bandwidth: float
    link: float


def t4_ratios(rates: dict, *, published_gbs: float, t4_tflops: float, t4_gbs: float, t4_link_gbs: float) -> Ratios:
    """From the measured rates of the GPU that ran (`tflops`, `host_link_gbs`; llamanb.rates.Rates) and a T4's.

    Bandwidths are compared as published, since both cards reach a similar part of theirs.
    """
    return Ratios(rates["tflops"] / t4_tflops, published_gbs / t4_gbs, rates["host_link_gbs"] / t4_link_gbs)


def t4_seconds(profile: dict, ratios: Ratios) -> float:
    """An estimate, and no more: matrix kernels by matrix rate, the others by bandwidth, copies by the link, one after
    the other. A copy's bytes are its time here times the link here."""
    return (
        profile["matrix_s"] * ratios.matrix
        + (profile["other_s"] + profile["within_s"]) * ratios.bandwidth
        + profile["link_s"] * ratios.link
    )
