"""A plan's layout put on a model: what becomes of each decoder layer's activations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llamanb.tape import OFFLOADED, STORED


def lay_out(model: PreTrainedModel, layers: Sequence[str]) -> None:
    """Sets each decoder layer's own checkpointing flag, which transformers 5.15 and 5.23 both read (the Trainer's
    option was renamed between them). No `layers` at all: everything is stored."""
    found = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer, kind in zip(found, layers or (STORED,) * len(found), strict=True):
        layer.gradient_checkpointing = kind != STORED
        layer._gradient_checkpointing_func = (
            _offloaded if kind == OFFLOADED else functools.partial(checkpoint, use_reentrant=False)
        )


def _offloaded(layer: Callable, *inputs: torch.Tensor) -> torch.Tensor:
    """Checkpointing whose saved input waits in pinned host memory."""
    with torch.autograd.graph.save_on_cpu(pin_memory=inputs[0].is_cuda):
        return checkpoint(layer, *inputs, use_reentrant=False)
