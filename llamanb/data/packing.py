"""Which rows go together into a micro-batch of fused layers, end to end and none padded."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which rows (by number) go together into micro-batches, the longest first: as many as would fit into `most` tokens
    if each were as long as the longest, which is how much attention kernels set aside. A row of more stands alone."""
    packed: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if packed and (len(packed[-1]) + 1) * lengths[packed[-1][0]] <= most:
            packed[-1].append(row)
        else:
            packed.append([row])
    return packed
