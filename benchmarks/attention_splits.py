"""The memory-efficient kernel's backward with each row's keys in so many parts, on the GPU that is there.

    python -m benchmarks.attention_splits run OUT
    python -m benchmarks.attention_splits report OUT

Milliseconds, medians of five, and which parts `llamanb.model.row_attention.splits` takes. 106 heads are to an H200's
132 multiprocessors what 32 are to a T4's 40.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from llamanb.model.row_attention import CAUSAL, splits

SHAPES = [
    *((rows, 32, 64, 8192) for rows in (1, 2, 4, 8)),
    *((rows, 32, 128, length) for length in (512, 1024, 2048, 4096) for rows in (1, 2)),
    *((rows, 32, 128, 512) for rows in (4, 8)),
    *((rows, 24, 128, 4096) for rows in (1, 2)),
    (4, 24, 128, 1024),
    *((1, 106, 128, length) for length in (512, 2048, 4096)),
    (1, 106, 64, 8192),
    (1, 212, 128, 1024),
    (1, 32, 128, 32768),
]
"""Rows, heads, head size, tokens of a row."""
PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 32)


def measure(rows: int, heads: int, size: int, length: int) -> dict:
    import torch

    given = torch.Generator("cuda").manual_seed(0)
    query, key, value, gradient = (
        torch.randn(rows, length, heads, size, device="cuda", dtype=torch.float16, generator=given) for _ in range(4)
    )
    aten = torch.ops.aten

    def forward():
        return aten._efficient_attention_forward(query, key, value, None, None, None, None, None, 0.0, CAUSAL, True)

    output, normalizer, seed, offset, *_ = forward()

    def backward(parts: int):
        return aten._efficient_attention_backward(
            gradient, query, key, value, None, output, None, None, length, length, normalizer, 0.0, seed, offset,
            CAUSAL, False, num_splits_key=parts,
        )  # fmt: skip

    return {
        "rows": rows,
        "heads": heads,
        "head_size": size,
        "length": length,
        "gpu": torch.cuda.get_device_name(),
        "taken": splits(query, length),
        "forward_ms": _ms(forward),
        "backward_ms": {parts: _ms(lambda parts=parts: backward(parts)) for parts in PARTS},
    }


def _ms(work: Callable) -> float:
    import torch

    work()
    taken = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end))
    return round(statistics.median(taken), 3)


def report(lines: list[dict]) -> str:
    header = ["rows × tokens", "heads × size", "forward ms", *(f"{n} parts" for n in PARTS), "taken"]
    text = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for line in lines:
        cells = [f"{line['rows']} × {line['length']:,}", f"{line['heads']} × {line['head_size']}", line["forward_ms"]]
        cells += [*line["backward_ms"].values(), line["taken"]]
        text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        Path(sys.argv[2]).write_text("".join(json.dumps(measure(*shape)) + "\n" for shape in SHAPES))
    elif sys.argv[1:2] != ["report"]:
        sys.exit(__doc__)
    print(report([json.loads(line) for line in Path(sys.argv[2]).read_text().splitlines()]))
