"""What of the memory lasts during training, counted tensor by tensor, in the buckets of the plan."""

from __future__ import annotations

import itertools

import torch

from llamanb.tape.workload import ADAPTERS, CONSTANTS, EMBEDDINGS, GRADIENTS, OPTIMIZER, WEIGHTS


def lasting_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Bytes by bucket of a model's weights, adapters and gradients and of the optimizer's states, on the model's
    device. Paged states count where they are resident, which nobody can see: as nothing."""
    found = dict.fromkeys((WEIGHTS, CONSTANTS, EMBEDDINGS, ADAPTERS, GRADIENTS, OPTIMIZER), 0)
    here = next(model.parameters()).device
    for name, parameter in itertools.chain(model.named_parameters(), model.named_buffers()):
        if parameter.device != here:  # streamed, and not here now
            continue
        ends = "embed_tokens" in name or "lm_head" in name
        bucket = ADAPTERS if "lora_" in name else EMBEDDINGS if ends else WEIGHTS
        found[bucket] += parameter.nbytes
        found[CONSTANTS] += sum(tensor.nbytes for tensor in _constants(parameter))
        if parameter.grad is not None:
            found[GRADIENTS] += parameter.grad.nbytes
    for module in model.modules():  # where int8 keeps its scales from the first forward pass on
        scales = getattr(getattr(module, "state", None), "SCB", None)
        found[CONSTANTS] += scales.nbytes if isinstance(scales, torch.Tensor) else 0
    for state in optimizer.state.values() if optimizer else ():
        tensors = (value for value in state.values() if isinstance(value, torch.Tensor))
        found[OPTIMIZER] += sum(t.nbytes for t in tensors if not getattr(t, "is_paged", False))
    return found


def _constants(parameter) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside quantized weights to turn them back (nn/modules.py, functional.QuantState)."""
    state = getattr(parameter, "quant_state", None)
    states = [state, getattr(state, "state2", None)]
    owned = [getattr(s, name, None) for s in states if s is not None for name in ("absmax", "code", "offset")]
    return [tensor for tensor in (*owned, getattr(parameter, "SCB", None)) if isinstance(tensor, torch.Tensor)]
