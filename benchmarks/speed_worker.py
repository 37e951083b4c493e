"""One contestant's process: trains when it is its turn, and waits with the model loaded while others have theirs.

`benchmarks.speed` starts it with a JSON object of settings and talks with it in lines of JSON: commands on standard
input, answers on what was standard output (what libraries print goes to standard error). Commands:

    {"do": "open", ...}    build a trainer (speed_stacks.Session) and train its warm-up steps
    {"do": "block", ...}   time some optimizer steps of the open session, then profile some
    {"do": "close"}        end it
    {"do": "quit"}

On a card that is pretended each turn takes ballast: of the GPU's memory only the card's is left free, so that a stack
which asks the driver sees about the same card (SPARE_GIB more, which a Hopper's larger CUDA context grows into).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import os
import sys
import tempfile
import time
import traceback

from benchmarks.speed_rows import drawn

GIB = 2**30
SPARE_GIB = 1.0


class Channel:
    """Lines of JSON both ways; keeps standard output to itself."""

    def __init__(self):
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **answer) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    def receive(self) -> dict:
        line = sys.stdin.readline()
        return json.loads(line) if line else {"do": "quit"}


class Gpu:
    """The GPU as one process may use it: memory limit, attention kernels, ballast. Does nothing on a CPU."""

    def __init__(self, device: str, limit_gib: float | None):
        self.here, self.limit_gib, self._ballast = device == "cuda", limit_gib, None

    def pretend(self) -> None:
        """Limits torch's allocator and switches off the attention kernels that a T4 lacks."""
        import torch

        if self.here and self.limit_gib:
            self.limit(True)
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)

    def limit(self, on: bool) -> None:
        import torch

        if self.here and self.limit_gib:
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(self.limit_gib * GIB / total if on else 1.0)

    def take_ballast(self) -> None:
        if not (self.here and self.limit_gib) or self._ballast:
            return
        import torch

        room = self.limit_gib * GIB - torch.cuda.memory_reserved() + SPARE_GIB * GIB
        size = int(torch.cuda.mem_get_info()[0] - room)
        if size > 0:
            pointer = ctypes.c_uint64()
            code = ctypes.CDLL("libcuda.so.1").cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size))
            if code:
                raise RuntimeError(f"ballast of {size / GIB:.1f} GiB: CUDA's driver answers {code}")
            self._ballast = pointer

    def rest(self) -> None:
        """Lets go of ballast and of everything cached: the turn is over."""
        if not self.here:
            return
        import torch

        if self._ballast:
            ctypes.CDLL("libcuda.so.1").cuMemFree_v2(self._ballast)
            self._ballast = None
        torch.cuda.empty_cache()

    def sync(self) -> None:
        if self.here:
            import torch

            torch.cuda.synchronize()

    def now(self):
        """A mark in time: of the GPU's queue where there is one, so that nothing waits for it."""
        if not self.here:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin, end) -> float:
        return begin.elapsed_time(end) / 1000 if self.here else end - begin

    def memory(self) -> dict:
        """GiB: peaks of torch's allocator since `reset`, and what NVML says this process holds."""
        if not self.here:
            return {"allocated_gib": None, "reserved_gib": None, "nvml_gib": None}
        import torch

        return {
            "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 4),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 4),
            "nvml_gib": _nvml_gib(),
        }

    def reset(self) -> None:
        if self.here:
            import torch

            torch.cuda.reset_peak_memory_stats()


def _nvml_gib() -> float | None:
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return round(process.usedGpuMemory / GIB, 4)
    return None


def turns(gpu: Gpu, channel: Channel, warm_steps: int, opened: dict, tokens: list[int] | None = None):
    """A trainer's callback that measures when it is told to, and holds training up in between.

    Args:
        tokens: of each optimizer step, in the order in which they come, over and over; told with what was timed where
            rows are of uneven length.
    """
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        """`command` is the first command that was not for this session."""

        def __init__(self):
            self.command, self.losses, self._marks, self._ends, self._inside = None, [], [], [], False
            self._done = 0
            self._began = time.perf_counter()

        def on_train_begin(self, args, state, control, **kwargs):
            opened["build_s"] = round(time.perf_counter() - self._began, 2)
            gpu.reset()
            self._turns = self._run()
            next(self._turns)

        def micro_batch_done(self) -> None:
            """For trainers that split a step by themselves; a step's last ends with the optimizer, `on_step_end`."""
            self._marks.append(gpu.now())
            self._inside = True

        def on_substep_end(self, args, state, control, **kwargs):
            self._marks.append(gpu.now())

        def on_step_end(self, args, state, control, **kwargs):
            if self._inside:
                self._marks.pop()
                self._inside = False
            self._marks.append(gpu.now())
            self._ends.append(self._marks[-1])
            self._done += 1
            if next(self._turns, self) is self:
                control.should_training_stop = True

        def on_log(self, args, state, control, logs=None, **kwargs):
            if len(self.losses) < 3 and "loss" in (logs or {}):
                self.losses.append(round(float(logs["loss"]), 4))

        def _run(self):
            """Each `yield` lets one optimizer step run."""
            begin = time.perf_counter()
            for step in range(warm_steps):
                yield
                gpu.sync()
                if step == 0:
                    opened["first_step_s"] = round(time.perf_counter() - begin, 2)
            channel.send(opened={**opened, "warm_s": round(time.perf_counter() - begin, 2), **gpu.memory()})
            warm = True
            while (command := channel.receive())["do"] == "block":
                begin = time.perf_counter()
                gpu.take_ballast()
                if not warm:
                    yield  # memory given back at the end of the last turn is taken again, untimed
                warm = False
                result = yield from self._block(command)
                gpu.rest()
                channel.send(block={**result, "losses": self.losses, "turn_s": round(time.perf_counter() - begin, 2)})
            self.command = command

        def _block(self, command: dict):
            gpu.sync()
            gpu.reset()
            self._marks = [gpu.now()]
            self._ends = self._marks[:]
            begin, steps = time.perf_counter(), 0
            wanted = command.get("steps") or -(-command["micro_steps"] // opened["accumulation"])
            while steps < wanted and (not steps or time.perf_counter() - begin < command["at_most_s"]):
                yield
                steps += 1
            gpu.sync()
            wall_s = time.perf_counter() - begin
            apart, step_s = (
                [round(gpu.seconds(a, b), 6) for a, b in itertools.pairwise(marks)]
                for marks in (self._marks, self._ends)
            )
            result = {"micro": opened["micro"], "accumulation": opened["accumulation"], "steps": steps}
            result |= {"wall_s": round(wall_s, 5), "micro_s": apart, "step_s": step_s}
            result |= self._tokens(steps) | gpu.memory()
            if command["profile"]:
                result["profile"] = yield from self._profiled(command["profile"])
            return result

        def _profiled(self, steps: int):
            from torch.profiler import ProfilerActivity, profile

            from benchmarks.speed_kernels import summary

            kind = ProfilerActivity.CUDA if gpu.here else ProfilerActivity.CPU
            with profile(activities=[kind]) as profiler:
                for _ in range(steps):
                    yield
                gpu.sync()
            return {"steps": steps, **self._tokens(steps), **summary(_gpu_events(profiler))}

        def _tokens(self, steps: int) -> dict:
            """Of the last `steps` steps, padding left out."""
            last = range(self._done - steps, self._done)
            return {"tokens": sum(tokens[step % len(tokens)] for step in last)} if tokens else {}

    return Turns()


def _gpu_events(profiler) -> list:
    from torch.autograd import DeviceType

    from benchmarks.speed_kernels import Event

    return [
        Event(event.name(), event.start_ns(), event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", bool)()  # a range drawn over kernels, not one of them
    ]


def run_session(stack, gpu: Gpu, channel: Channel, command: dict) -> dict:
    """Trains one session to its end; returns the command that ended it."""
    begin = time.perf_counter()
    turn = trainer = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            opened = stack.prepare(command)
            gpu.take_ballast()
            opened["load_s"] = round(time.perf_counter() - begin, 2)
            turn = turns(gpu, channel, command["warm_steps"], opened, step_tokens(command))
            trainer = stack.trainer(command, folder, turn)
            trainer.train()
        answer = turn.command
    except Exception as error:
        said = traceback.format_exc()
        print(said, file=sys.stderr, flush=True)
        traceback.clear_frames(error.__traceback__)
        text = (str(error).strip().splitlines() or [""])[0][:300]
        channel.send(failed=f"{type(error).__name__}: {text}", oom=is_out_of_memory(error))
        answer = None
    finally:
        with contextlib.suppress(Exception):
            stack.finish(trainer)
        del trainer, turn
        gc.collect()
        with contextlib.suppress(Exception):
            gpu.rest()
    return answer or channel.receive()


def step_tokens(session: dict) -> list[int] | None:
    """Real tokens of each optimizer step of one pass over the session's rows; None where all rows are of one length."""
    if not session.get("lengths"):
        return None
    lengths, effective = [tokens for tokens, _ in drawn(session)], session["effective"]
    return [sum(lengths[begin : begin + effective]) for begin in range(0, len(lengths), effective)]


def is_out_of_memory(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return any(part in text for part in ("outofmemory", "out of memory", "alloc_failed", "doesnotfit"))


def main() -> None:
    channel = Channel()
    settings = json.loads(sys.argv[1])
    gpu = Gpu(settings["device"], settings["limit_gib"])
    begin = time.perf_counter()
    try:
        from benchmarks.speed_stacks import STACKS

        stack = STACKS[settings["stack"]](settings, gpu)
        channel.send(ready=stack.versions(), import_s=round(time.perf_counter() - begin, 1))
    except Exception as error:
        traceback.print_exc()
        channel.send(failed=f"{type(error).__name__}: {str(error)[:300]}", oom=False)
        return
    command = channel.receive()
    while command["do"] != "quit":
        if command["do"] == "open":
            command = run_session(stack, gpu, channel, command)
        else:
            if command["do"] == "block":  # for a session that has failed
                channel.send(failed="no session is open", oom=False)
            command = channel.receive()


if __name__ == "__main__":
    main()
