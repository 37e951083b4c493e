"""The Triton kernels without a GPU: each compiled for the cards that will run it, and run in Triton's interpreter."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llamanb.model import kernels

HERE = Path(__file__).parent
JITTED = {name: kernel for name, kernel in vars(kernels).items() if isinstance(kernel, triton.JITFunction)}
WRITTEN = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int64: "i64"}
TARGETS = [
    (75, torch.float16),
    (75, torch.float32),
    (80, torch.bfloat16),
    (86, torch.float16),
    (90, torch.bfloat16),
    (120, torch.bfloat16),
]
"""Compute capabilities from the T4's on, with what is computed there."""
TOKENS, HIDDEN, WIDE, HEADS, HEAD_SIZE, VOCABULARY = 512, 3072, 8192, 24, 128, 128256
"""Llama 3.2 3B's: widths and heads that are no power of two."""


@pytest.mark.slow
def test_every_kernel_is_the_same_in_the_interpreter_as_in_plain_pytorch():
    """In a process of its own, which asks for the interpreter before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, str(HERE / "interpreted_kernels.py")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def launches(monkeypatch, dtype, tokens=TOKENS):
    """What each kernel is launched with, by name: (arguments by name, options). All tensors are of 3B's shape, and
    without memory."""
    found = {}

    class Launch:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                named = zip(self.kernel.arg_names, arguments, strict=True)
                found.setdefault(self.kernel.__name__, []).append((dict(named), options))

            return launch

    for name, kernel in JITTED.items():
        monkeypatch.setattr(kernels, name, Launch(kernel))

    def given(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def packed(nested):
        bytes_ = WIDE * HIDDEN // 2
        values, scales = given(16, dtype=torch.float32), given(bytes_ // 32 // 256, dtype=torch.float32)
        levels = SimpleNamespace(absmax=scales, code=given(256, dtype=torch.float32))
        state = SimpleNamespace(shape=(WIDE, HIDDEN), dtype=dtype, nested=nested, code=values, state2=levels)
        state.absmax = given(bytes_ // 32, dtype=torch.uint8 if nested else torch.float32)
        state.offset = given(dtype=torch.float32)
        return given(bytes_, 1, dtype=torch.uint8), state

    x, wide = given(tokens, HIDDEN), given(tokens, WIDE)
    heads, angles = given(tokens, HEADS, HEAD_SIZE), given(tokens, HEAD_SIZE)
    calls = {
        kernels.dequantize: [packed(False), packed(True)],
        kernels.rms_norm: [(x, given(HIDDEN), 1e-5)],
        kernels.rms_norm_backward: [(x, x, given(HIDDEN), 1e-5)],
        kernels.swiglu: [(wide, wide)],
        kernels.swiglu_backward: [(wide, wide, wide)],
        kernels.rotate: [(heads, angles, angles, 1), (heads, angles, angles, -1)],
        kernels.cross_entropy_: [(given(tokens, VOCABULARY), given(tokens, dtype=torch.int64))],
    }
    for function, every in calls.items():
        for arguments in every:
            function(*arguments)
    return found


def source(kernel, arguments):
    """As Triton's launcher would have it: what is 1 is a constant, and what 16 divides is known to be so."""
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for place, (name, value) in enumerate(arguments.items()):
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{WRITTEN[value.dtype]}"
        elif name in fixed or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (signature[name] == "i32" and value % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_every_kernel_compiles_for_every_card(monkeypatch, tmp_path, capability, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = launches(monkeypatch, dtype)
    assert found.keys() == JITTED.keys(), "a kernel that `launches` does not know"
    for name, every in found.items():
        for arguments, options in every:
            made = triton.compile(
                source(JITTED[name], arguments), target=GPUTarget("cuda", capability, 32), options=options
            )
            assert made.asm["cubin"], name
            assert f".target sm_{capability}" in made.asm["ptx"]
            assert made.metadata.shared <= 48 * 1024, "what every card has for each program without asking"
            assert " mma" not in made.asm["ptx"], "no matrix products: a T4 has no tl.dot"


def test_nothing_is_compiled_again_for_another_number_of_tokens(monkeypatch):
    """Rows are packed, so each micro-batch has its own. What a kernel is compiled for is told by `source`."""

    def compiled_for(tokens):
        found = launches(monkeypatch, torch.float16, tokens)
        made = {name: [source(JITTED[name], arguments) for arguments, _ in every] for name, every in found.items()}
        options = {name: [more for _, more in every] for name, every in found.items()}
        return {
            name: [(one.signature, one.constants, one.attrs) for one in every] for name, every in made.items()
        }, options

    warm = compiled_for(TOKENS)
    for tokens in (1, 2, 3, 15, 16, 17, 31, 255, 511, 513, 2047, 4096):
        assert compiled_for(tokens) == warm, tokens


def test_kernels_are_named_like_their_plain_forms():
    from llamanb.model import elementwise

    public = {name for name, value in vars(kernels).items() if inspect.isfunction(value) and name[0] != "_"}
    assert {f"_{name.rstrip('_')}" for name in public} == JITTED.keys()
    for name in public:
        assert inspect.isfunction(getattr(elementwise, name)), name
