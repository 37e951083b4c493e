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

from llamanb.errors import GpuError
from llamanb.layout import GIB
from llamanb.ranks import Ranks
from llamanb.timeline import Timeline

BUCKET = 4 * 2**20
"""Numbers that are added up at once: of fp32 gradients 16 MiB."""
PATIENCE = timedelta(days=7)
"""For rank 0's word: it may be scoring. One that dies closes its connections, and whoever launched it ends the rest."""
STEP_PATIENCE = timedelta(minutes=30)
"""For a step's gradients: a share that ran out of memory is computed again."""
SERVE = "serve"
"""Rank 0's word that it computes alone, and needs the others' parts of the layers."""
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
"""Variables that torchrun and accelerate launch set."""
ACCELERATE = "ACCELERATE_"
"""How those begin with which accelerate launch gives the Trainer another precision, compiler or sharding."""


class Peers(Ranks):
    """One of several.

    Args:
        number: of this process among all; 0 leads.
        count: of processes.
        local: number of this process among those of its machine, which is its GPU's.
    """

    def __init__(self, number: int, count: int, local: int):
        self.number, self.count, self.local = number, count, local
        self.host, self.joined = platform.node(), False
        self._words: dist.ProcessGroup | None = None

    @classmethod
    def launched(cls) -> Ranks:
        """This process as torchrun or accelerate launched it, or alone. To be called before torch sees a GPU: of those
        here it will see its own only.

        The launcher's variables leave the environment, so that transformers takes this for a training of its own: else
        it would cut up the data, wrap the model and count steps in its own way, or compute in another precision.

        Raises GpuError where accelerate launched a single process of several that were asked for.
        """
        told = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(ACCELERATE)}
        if told and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
            why = "with --cpu, or configured for one GPU, accelerate launch starts one process whatever --num_processes"
            fix = "accelerate launch --multi_gpu --num_processes 2 ..., also without a GPU; or torchrun"
            raise GpuError("one process was launched where several were asked for", why, fix)
        count = int(os.environ.get("WORLD_SIZE", 1))
        if count == 1:
            return Ranks()
        found = cls(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", 0)))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        own = str(found.local) if visible is None else "".join(visible.split(",")[found.local : found.local + 1])
        os.environ["CUDA_VISIBLE_DEVICES"] = own
        return found

    def join(self) -> None:
        """Meets the others. Raises GpuError where they cannot meet."""
        gpu = os.environ["CUDA_VISIBLE_DEVICES"] != "" and torch.cuda.is_available()
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

    def leave(self) -> None:
        dist.destroy_process_group()

    def tell(self, what: Any) -> None:
        dist.broadcast_object_list([what], src=0, group=self._words)

    def told(self) -> Any:
        """What rank 0 tells, as soon as it does."""
        said = [None]
        dist.broadcast_object_list(said, src=0, group=self._words)
        return said[0]

    def all_of(self, what: Any) -> list:
        said = [None] * self.count
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
        _add_up([*gradients, total])
        return total[0]


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
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


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
