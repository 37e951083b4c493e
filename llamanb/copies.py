"""Where weights wait that are not on the card, and how long they take to come: host memory holds as many layers as it
has room for, and the disk the rest. And the inputs of offloaded layers, which wait in host memory too."""

from __future__ import annotations

import math

from llamanb.card import Card
from llamanb.disk import GBS, SPARE_GIB
from llamanb.tape import BYTES, CHECKPOINTED, OFFLOADED, Workload, streamed_bytes
from llamanb.tape.workload import BUFFERS, STAGED, spread

HOST_GIB = 2.0
"""Host memory that a training takes beside streamed weights."""
GIB = 2**30


def room_in_memory(work: Workload, card: Card) -> int:
    """How many layers' weights host memory has room for, a token embedding that waits there aside; below 0 where that
    has none."""
    if card.host_gib is None:
        return len(work.layers)
    room = (card.host_gib - HOST_GIB) * GIB - embedding_bytes(work)
    return min(len(work.layers), math.floor(room / streamed_bytes(work)))


def room_with_disk(work: Workload, card: Card) -> int:
    """How many have room in host memory, or in that and on disk; what comes from the disk passes through STAGED layers'
    worth of memory. Layers of a checkpoint in 4 bits are read from where they are."""
    room, depth = room_in_memory(work, card), len(work.layers)
    if room < STAGED:
        return room
    if card.disk_gib is None or work.model.quantization:
        return depth
    below = int(max(0.0, card.disk_gib - SPARE_GIB) * GIB / streamed_bytes(work))
    return max(room, min(depth, room - STAGED + below))


def on_disk(work: Workload, card: Card) -> tuple[int, ...]:
    """Numbers of the streamed layers that wait on disk: those that host memory has no room for, evenly spread."""
    room = room_in_memory(work, card)
    if work.shards > 1 or work.streamed <= room:
        return ()
    streamed = spread(work.streamed, len(work.layers))
    return tuple(streamed[n] for n in spread(work.streamed - max(0, room - STAGED), work.streamed))


def waiting_bytes(work: Workload, card: Card) -> tuple[int, int]:
    """Of weights in host memory: of streamed layers, of the token embedding with them, and of what those on disk pass
    through; and on disk."""
    if not work.streamed:
        return 0, 0
    below, size = len(on_disk(work, card)), streamed_bytes(work)
    layers = work.streamed - below + (STAGED if below else 0) if work.shards == 1 else 0
    return layers * size + embedding_bytes(work), below * size


def input_bytes(work: Workload) -> int:
    """Of a layer's input in host memory: torch takes pinned memory in powers of two."""
    return 1 << (work.tokens * work.model.hidden * BYTES[work.dtype] - 1).bit_length()


def least_kept(work: Workload, card: Card) -> tuple[str, ...]:
    """What takes least of the card: inputs of as many layers in host memory as that has room for, beside the weights
    that wait there; the others recomputed from the card."""
    depth = len(work.layers)
    if card.host_gib is None:
        return (OFFLOADED,) * depth
    room = (card.host_gib - HOST_GIB) * GIB - waiting_bytes(work, card)[0]
    offloaded = max(0, min(depth, math.floor(room / input_bytes(work))))
    return (OFFLOADED,) * offloaded + (CHECKPOINTED,) * (depth - offloaded)


def embedding_bytes(work: Workload) -> int:
    """Of a token embedding that is not the head too."""
    return 0 if work.model.tied else BYTES[work.dtype] * work.model.embedding_parameters


def copies_s(work: Workload, card: Card) -> float:
    """Seconds of the copies of a forward pass, and of a backward pass; layers that are there at a turn are not copied,
    nor read."""
    return max(0, work.streamed - BUFFERS) * streamed_bytes(work) / link(card)


def reads_s(work: Workload, card: Card) -> float:
    """Seconds of what is read from disk in a forward pass, and in a backward pass."""
    if not (below := len(on_disk(work, card))):
        return 0.0
    return below * max(0, work.streamed - BUFFERS) / work.streamed * streamed_bytes(work) / disk(card)


def link(card: Card) -> float:
    """Bytes a second from host memory."""
    return (card.host_link_gbs or 10) * 1e9


def disk(card: Card) -> float:
    """Bytes a second from disk."""
    return (card.disk_gbs or GBS) * 1e9
