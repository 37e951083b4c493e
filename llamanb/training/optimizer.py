"""bitsandbytes' AdamW over a few long tensors in place of hundreds of short ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from bitsandbytes.optim import AdamW
from torch.nn import Parameter
from torch.optim import Optimizer

from llamanb.tape import joined

STATES = ("state1", "state2", "absmax1", "absmax2")


class JoinedAdamW(AdamW):
    """Updates several adapters at once, laid end to end (`tape.joined`), bit for bit as each by itself: constants of
    8-bit states are for blocks of 256 elements, and what is joined has whole blocks. bitsandbytes (0.50) updates
    tensor by tensor and waits for the GPU after each, about three times as long.

    What is joined has its state under its first parameter, and is updated where that has a gradient: all have, or none.

    Args:
        of_layer: tensors of each layer, which come one after the other.
        settings: bitsandbytes' own.
    """

    def __init__(self, parameters, *, of_layer: int, **settings):
        super().__init__(parameters, **settings)
        self.of_layer = of_layer

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for at, parameters in self._together(group):
                if parameters[0].grad is not None:
                    self._update(group, number, at, parameters)
        if self.is_paged and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies of paged states are not waited for otherwise
        return loss

    def _update(self, group: dict, number: int, at: int, parameters: Sequence[Parameter]) -> None:
        first, long = parameters[0], _long(parameters)
        self.state[long] = state = self.state[first]
        try:
            if not state:
                self.init_state(group, long, number, at)
            self.prefetch_state(long)
            self.update_step(group, long, number, at)
        finally:
            if long is not first:
                del self.state[long]
        if long is not first:
            sizes = [parameter.numel() for parameter in parameters]
            torch._foreach_copy_([p.detach().view(-1) for p in parameters], long.detach().split(sizes))

    def load_state_dict(self, state_dict: dict, move_to_device: bool = True) -> None:
        """Also states of bitsandbytes' own AdamW, tensor by tensor.

        Raises:
            ValueError: they are of other parameters.
        """
        super().load_state_dict(state_dict, move_to_device)
        for group in self.param_groups:
            for _, parameters in self._together(group):
                states = [self.state.pop(p) for p in parameters if p in self.state]
                if states:
                    self.state[parameters[0]] = _joined(states, sum(p.numel() for p in parameters))

    def _together(self, group: dict) -> Iterator[tuple[int, Sequence[Parameter]]]:
        """With the number of the first."""
        parameters = group["params"]
        for numbers in joined([parameter.numel() for parameter in parameters], self.of_layer):
            yield numbers.start, parameters[numbers.start : numbers.stop]


def page_again(optimizer: Optimizer) -> None:
    """Moves loaded states back to paged memory: bitsandbytes (0.50) loads them as plain tensors on the GPU."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not getattr(optimizer, "is_paged", False):
        return
    for state in optimizer.state.values():
        for name in state.keys() & {"state1", "state2"}:
            paged = optimizer.get_state_buffer(state[name], state[name].dtype)
            if state[name].is_cuda:
                torch.cuda.synchronize()  # the buffer is filled with zeros meanwhile
            state[name] = paged.copy_(state[name])


def _joined(states: Sequence[dict], size: int) -> dict:
    """The state of `size` elements one behind the other."""
    state = states[0]
    if len(states) > 1:
        state |= {name: torch.cat([one[name].flatten() for one in states]) for name in STATES if name in state}
    if (found := state["state1"].numel()) != size:
        raise ValueError(f"an optimizer state of {found} elements, for {size} that are trained")
    return state


def _long(parameters: Sequence[Parameter]) -> Parameter:
    """One parameter with the values and gradients of all; itself where it is one."""
    if len(parameters) == 1:
        return parameters[0]
    long = Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    long.grad = torch.cat([parameter.grad.flatten() for parameter in parameters])
    return long
