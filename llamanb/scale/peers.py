"""Processes that train together, over torch.distributed: gloo for words and on CPUs, NCCL for gradients on GPUs."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from llamanb.attempts import is_out_of_memory
from llamanb.errors import GpuError
from llamanb.layout import GIB
from llamanb.nvml import first_line
from llamanb.ranks import Ranks
from llamanb.scale.launched import ENDED, LAUNCHER, VISIBLE
from llamanb.timeline import Timeline

BUCKET = 4 * 2**20
"""Numbers that are added up at once: of fp32 gradients 16 MiB."""
PATIENCE = timedelta(days=7)
"""For rank 0's word: it may be scoring. One that dies closes its connections, and whoever launched it ends the rest."""
STEP_PATIENCE = timedelta(minutes=30)
"""For a step's gradients: a share that ran out of memory is computed again."""
SERVE = "serve"
"""Rank 0's word that it computes alone, and needs the others' parts of the layers."""


class RankEnded(GpuError):
    """Another rank has ended, and with it the training; what it said is the cause."""


class Peers(Ranks):
    """One of several: number `number` of `count`; 0 leads."""

    def __init__(self, number: int, count: int):
        self.number, self.count = number, count
        self.host, self.joined = platform.node(), False
        self._words: dist.ProcessGroup | None = None

    def join(self) -> None:
        """Meets the others. The launcher's variables leave the environment, so that transformers takes this for a
        training of its own: else it would cut up the data, wrap the model and count steps in its own way.

        Raises GpuError where they cannot meet, or where two of them see the same GPU."""
        gpu = os.environ[VISIBLE] != "" and torch.cuda.is_available()
        if gpu and not dist.is_nccl_available():
            fix = (
                "install torch from its own index: pip install torch --index-url https://download.pytorch.org/whl/cu130"
            )
            raise GpuError("this torch cannot train on several GPUs", "it was built without NCCL", fix)
        try:
            group = {"rank": self.number, "world_size": self.count, "timeout": STEP_PATIENCE}
            dist.init_process_group("nccl" if gpu else "gloo", **group)
            self._words = dist.new_group(backend="gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            fix = "another port (--main_process_port, --master-port); or see that all machines reach that address"
            raise GpuError(
                f"rank {self.number} of {self.count} cannot meet the others", f"at {address}: {error}", fix
            ) from None
        self.joined = True
        for name in LAUNCHER:
            os.environ.pop(name, None)
        require_own_gpus(self.all_of((self.host, str(torch.cuda.get_device_properties(0).uuid)) if gpu else None))

    def leave(self) -> None:
        dist.destroy_process_group()

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """Around what needs all ranks. Raises RankEnded where another one has."""
        try:
            yield
        except RuntimeError as error:  # gloo's, NCCL's and the store's are all of that kind, and so are this GPU's own
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise
            fix = "see what it said, and run this again: it goes on from the newest checkpoint"
            raise RankEnded(f"another of the {self.count} {ENDED}", first_line(error), fix) from None

    def tell(self, what: Any) -> None:
        with self.meeting():
            dist.broadcast_object_list([what], src=0, group=self._words)

    def told(self) -> Any:
        """What rank 0 tells, as soon as it does."""
        said = [None]
        with self.meeting():
            dist.broadcast_object_list(said, src=0, group=self._words)
        return said[0]

    def all_of(self, what: Any) -> list:
        said = [None] * self.count
        with self.meeting():
            dist.all_gather_object(said, what, group=self._words)
        return said

    def watchers(self, timeline=None) -> list:
        return [Together(self, timeline)]

    @property
    def streams(self):
        from llamanb.scale.sharded import Sharing

        return Sharing(self)

    @contextlib.contextmanager
    def scoring(self, model) -> Iterator[None]:
        layers = shared_layers(model)
        if layers:
            self.tell(SERVE)
        with layers.leading() if layers else contextlib.nullcontext():
            yield

    def share(self, lengths: Sequence[int]) -> list[int]:
        """From the longest row on, each goes to whoever has fewest tokens so far."""
        tokens, mine = [0] * self.count, []
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            rank = min(range(self.count), key=tokens.__getitem__)
            tokens[rank] += lengths[row]
            if rank == self.number:
                mine.append(row)
        return sorted(mine)

    @contextlib.contextmanager
    def drawing(self, seed: int, step: int) -> Iterator[None]:
        """The same when the step is done again; what all draw alike, such as the order of the rows, stays alike."""
        with torch.random.fork_rng():
            torch.manual_seed((seed * 1_000_003 + step) * self.count + self.number)
            yield

    def summed(self, total: Tensor | int, parameters: Iterable[Tensor]) -> Tensor:
        gradients = []
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:  # a step with fewer rows than ranks
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        total = torch.as_tensor(total, dtype=torch.float32, device=gradients[0].device).reshape(1)
        with self.meeting():
            _add_up([*gradients, total])
        return total[0]


def require_own_gpus(seen: Sequence[tuple[str, str] | None]) -> None:
    """Raises GpuError where two ranks see one GPU. Each rank's machine and first GPU's UUID; None: it uses none."""
    first: dict = {}
    for number, gpu in enumerate(seen):
        other = first.setdefault(gpu, number) if gpu else number
        if other != number:
            why = "the processes had asked the driver for GPUs before each was given its own"
            fix = "launch it as `python -m llamanb`; in a script of yours call llamanb.scale.launched.launched() first"
            raise GpuError(f"ranks {other} and {number} both use one GPU of {gpu[0]}", why, fix)


class Together(TrainerCallback):
    """Ends training on all ranks after the same step, when any of them would end; and tells rank 0 each one's peak."""

    def __init__(self, ranks: Peers, timeline: Timeline | None):
        self.ranks, self.timeline, self._ends = ranks, timeline, False

    def on_step_end(self, args, state, control, **kwargs):
        peak = torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_initialized() else 0.0
        said = self.ranks.all_of((control.should_training_stop, peak))
        control.should_training_stop = self._ends = any(ends for ends, _ in said)
        if self.timeline:
            self.timeline.cards_gib = [
                max(pair) for pair in zip_longest(self.timeline.cards_gib, (gib for _, gib in said), fillvalue=0.0)
            ]

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = self._ends  # an interrupt that came meanwhile is for the next step


def shared_layers(model):
    """The layers whose weights ranks share; None where each has a copy."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = getattr(core, "streamed", None)
    return layers if hasattr(layers, "serve") else None


def _add_up(tensors: Sequence[Tensor]) -> None:
    """Leaves in each tensor the sum of all ranks'."""
    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():  # no copy of what is large
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [part.view_as(tensor) for tensor, part in zip(bucket, parts, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """In order, each of one dtype and of BUCKET numbers at most, or of a single tensor."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not buckets or buckets[-1][0].dtype != tensor.dtype or size + tensor.numel() > BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets
