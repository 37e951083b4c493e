"""Which of several processes this one is, by what its launcher left in the environment; and its own GPU.

Without torch, and to be called before anything imports it: a process keeps the GPUs that the driver showed it when it
was first asked for them, and libraries ask as they are imported.
"""

from __future__ import annotations

import os

from llamanb.errors import GpuError

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
"""Variables that torchrun and accelerate launch set."""
ACCELERATE = "ACCELERATE_"
"""How those begin with which accelerate launch gives the Trainer another precision, compiler or sharding."""
ENDED = "ranks has ended"
"""How an error says that it is another rank's end, and not a cause."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


def launched() -> tuple[int, int]:
    """This process' number among those that torchrun or accelerate launched, and how many they are; (0, 1) alone. Of
    the GPUs here it will see its own only, or none where there are fewer than processes.

    accelerate's own variables leave the environment: with them the Trainer would compute in another precision.

    Raises GpuError where accelerate launched a single process of several that were asked for.
    """
    told = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(ACCELERATE)}
    if told and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        why = "with --cpu, or configured for one GPU, accelerate launch starts one process whatever --num_processes"
        fix = "accelerate launch --multi_gpu --num_processes 2 ..., also without a GPU; or torchrun"
        raise GpuError("one process was launched where several were asked for", why, fix)
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        for name in LAUNCHER:  # or the Trainer would wrap the model all the same
            os.environ.pop(name, None)
        return 0, 1
    local, visible = int(os.environ.get("LOCAL_RANK", 0)), os.environ.get(VISIBLE)
    os.environ[VISIBLE] = str(local) if visible is None else "".join(visible.split(",")[local : local + 1])
    return int(os.environ["RANK"]), count
