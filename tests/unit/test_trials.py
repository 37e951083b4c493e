"""What really runs: tried on this CPU; a GPU's refusals from texts that torch gives there."""

import pytest

from llamanb.gpu_check import kernels, try_precisions
from llamanb.trials import DTYPES, KERNELS, Attention, refusal, working_attention

torch = pytest.importorskip("torch")


def test_what_runs_on_a_cpu():
    tried = working_attention("fp32", "cpu")
    assert tried.runs() == tried.runs(gqa=True) == ("flash", "math")
    assert tried.plain["cudnn"] == "torch has no such kernel for this device and dtype"
    assert list(tried.plain) == list(tried.grouped) == list(KERNELS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_math_kernel_runs_in_every_precision(dtype):
    tried = working_attention(dtype, "cpu", heads=4, kv_heads=4, head_dim=64)
    assert tried.dtype == dtype
    assert "math" in tried.runs()


def test_trying_leaves_no_workspace_of_a_second_thread(monkeypatch):
    """cuBLAS keeps one for each thread that had a product, as long as the process lives."""
    threads, grad = [], torch.autograd.grad

    def watched(*args):
        threads.append(torch.autograd.is_multithreading_enabled())
        return grad(*args)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    working_attention("fp32", "cpu")
    assert threads
    assert not any(threads)
    assert torch.autograd.is_multithreading_enabled()


def test_kernels_that_are_switched_off_do_not_count():
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)
    try:
        tried = working_attention("fp32", "cpu")
        assert not torch.backends.cuda.flash_sdp_enabled(), "switches stay as the caller set them"
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_math_sdp(True)
    assert tried.runs() == ()
    assert tried.plain["flash"] == "switched off: torch.backends.cuda.enable_flash_sdp(False)"
    assert tried.grouped["math"] == "switched off: torch.backends.cuda.enable_math_sdp(False)"


def test_random_state_and_gradients_of_the_caller_stay():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with torch.inference_mode():
        assert working_attention("fp32", "cpu").runs()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("wrong", [lambda out: out * 1.1, lambda out: out * float("nan")])
def test_a_kernel_that_runs_and_is_wrong_does_not_count(wrong, monkeypatch):
    right = torch.nn.functional.scaled_dot_product_attention

    def sometimes_wrong(query, *rest, **options):
        out = right(query, *rest, **options)
        return wrong(out) if query.dtype == torch.bfloat16 else out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sometimes_wrong)
    tried = working_attention("bf16", "cpu")
    assert tried.runs() == ()
    assert "its result is off by" in tried.plain["math"]


def test_a_refusal_names_its_own_reasons():
    said = [
        "Memory efficient kernel not used because: (Triggered internally at sdp_utils.cpp:800.)",
        "For dense input, both fused kernels require query, key and value to have the same num_heads. (Triggered ...)",
        "Flash attention kernel not used because:",
        "Flash attention only supports gpu architectures in the range [sm80, sm121].",
        "CuDNN attention kernel not used because:",
        "CuDNN attention has been runtime disabled.",
        "CuDNN attention has been runtime disabled.",
    ]
    error = RuntimeError("No available kernel. Aborting execution.")
    assert refusal("memory-efficient", error, said).startswith("For dense input")
    assert refusal("flash", error, said) == said[3]
    assert refusal("cudnn", error, said) == "CuDNN attention has been runtime disabled."
    assert refusal("math", error, said) == "torch has no such kernel for this device and dtype"


def test_other_errors_are_told_by_their_first_line():
    error = RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors ...")
    assert refusal("math", error, []) == "CUDA error: no kernel image is available for execution on the device"
    assert refusal("math", RuntimeError(), []) == "RuntimeError"


def test_precisions_are_tried_and_errors_kept():
    assert all(rate > 0 for rate in try_precisions("cpu", size=64).values())
    assert set(try_precisions("cpu", size=64)) == set(DTYPES)
    if not torch.cuda.is_available():
        assert all(isinstance(error, str) for error in try_precisions("cuda", size=64).values())


def test_how_trials_read():
    tried = kernels(Attention("fp16", "cuda:0", plain={"math": ""}, grouped={"math": "<script>"}))
    assert "tried on cuda:0 in fp16" in str(tried)
    assert "runs" in repr(tried)
    assert "<script>" not in tried._repr_html_()
