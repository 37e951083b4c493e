"""What a GPU computes in: bf16, fp16 or fp32, by its compute capability and what is asked for."""

from __future__ import annotations

from typing import NamedTuple

from llamanb.errors import GpuError, RecipeError
from llamanb.trials import DTYPES

BF16_CAPABILITY = (8, 0)
"""The first compute capability with bf16 matrix units (Ampere)."""


class Precision(NamedTuple):
    """What a card computes in, and why: the two belong together wherever they are shown."""

    dtype: str
    """One of `DTYPES`."""
    reason: str


def choose_precision(capability: tuple[int, int] | None, wanted: str = "auto") -> Precision:
    """The dtype for the 16-bit parts of a training run.

    It asks the compute capability and not `torch.cuda.is_bf16_supported()`, which is True on a T4: emulation counts.

    Args:
        capability: compute capability of the GPU; None for a CPU.
        wanted: a recipe's `precision`: "auto", or one of `DTYPES`.

    Raises:
        RecipeError: `wanted` is no precision.
        GpuError: bf16 below capability 8.0, or fp16 on a CPU.
    """
    if wanted not in ("auto", *DTYPES):
        why = "It is not a precision that llamanb knows."
        raise RecipeError(f"precision={wanted!r}", why, f"One of: auto, {', '.join(DTYPES)}.")
    if capability is None:
        if wanted == "fp16":
            raise GpuError(
                'precision="fp16" without a GPU',
                "fp16 needs loss scaling, which llamanb does on a GPU only.",
                'Set precision="auto": fp32 on a CPU, and fp16 or bf16 by itself on a GPU.',
            )
        if wanted == "auto":
            return Precision("fp32", "a CPU: fp32 runs on every one, and the tiny model has room")
        quicker = "; whether it is quicker than fp32 depends on the CPU" if wanted == "bf16" else ""
        return Precision(wanted, f"as asked{quicker}")
    number = dotted(capability)
    has_bf16 = tuple(capability) >= BF16_CAPABILITY
    if wanted == "bf16" and not has_bf16:
        raise GpuError(
            f'precision="bf16" on a GPU of compute capability {number}',
            "bf16 matrix units begin at 8.0 (RTX 30, A100, L4). torch.cuda.is_bf16_supported() says True here because "
            "it counts emulation.",
            'Set precision="auto" (fp16 with loss scaling on this GPU).',
        )
    if wanted != "auto":
        return Precision(wanted, "as asked")
    if has_bf16:
        return Precision("bf16", f"compute capability {number} has bf16, which needs no loss scaling")
    reason = f"compute capability {number} is below 8.0: bf16 would be emulated (torch still calls it supported)"
    return Precision("fp16", reason)


def dotted(capability: tuple[int, int]) -> str:
    """(7, 5) as "7.5"."""
    return ".".join(map(str, capability))
