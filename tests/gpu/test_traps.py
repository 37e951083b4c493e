"""What breaks or crawls on a T4 when our fix is switched off, reproduced on a real GPU.

python -m pytest tests/gpu/test_traps.py -s
"""

import json
import os
import subprocess
import sys

import pytest

from llamanb import Card, Recipe, load_data, plan, train
from llamanb.layout import EXPANDED_ATTENTION
from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
T4 = Card("like a T4", (7, 5), 14.4, attention=("memory-efficient", "math"), attention_gqa=("math",))


@pytest.fixture
def no_flash():
    """Only what a T4 has: the memory-efficient and the math kernel."""
    flash, cudnn = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


@pytest.fixture
def recipe(mini, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(20)))
    return Recipe(model=str(mini), dataset=str(rows), max_length=64, effective_batch_size=4, steps=3, eval_rows=0)


def test_adapters_in_bf16_stop_fp16_training_at_the_first_step(recipe, tmp_path, monkeypatch):
    from llamanb.training import trainer

    p, data = plan(recipe, T4), load_data(recipe)
    assert p.dtype == "fp16"
    train(p, data, name="fixed", runs=tmp_path)
    monkeypatch.setattr(trainer, "widen_trained", lambda model: None)
    with pytest.raises(NotImplementedError, match="_amp_foreach_non_finite_check_and_unscale_cuda"):
        train(p, data, name="as-trl-does", runs=tmp_path)


def _attention_step(model, tokens: int) -> tuple[float, float, set[str]]:
    """(GiB above what was held before, milliseconds, kernels) of one forward and backward of a layer."""
    from torch.profiler import ProfilerActivity, profile

    ids = torch.randint(0, 500, (2, tokens), device="cuda")

    def step():
        model(input_ids=ids, use_cache=False).logits[:, :1].sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    extra, took = torch.cuda.max_memory_allocated() - held, start.elapsed_time(end)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
    kernels = {event.key for event in profiled.key_averages() if "fmha" in event.key.lower()}
    return extra / 2**30, took, kernels


def test_grouped_heads_take_the_math_kernel_without_flash(tmp_path, no_flash):
    from transformers import AutoModelForCausalLM

    from llamanb.model import attention

    attention.register()
    folder = make_checkpoint("8b", tmp_path / "layer", num_hidden_layers=1, intermediate_size=512)
    figures = {}
    for name in (EXPANDED_ATTENTION, "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float16, device_map={"": 0}, attn_implementation=name
        )
        model.lm_head.requires_grad_(False)
        model.model.embed_tokens.requires_grad_(False)
        figures[name] = _attention_step(model.train(), 4096)
        del model
        torch.cuda.empty_cache()
    (ours_gib, ours_ms, ours), (math_gib, math_ms, theirs) = figures[EXPANDED_ATTENTION], figures["sdpa"]
    print(f"\none 8B-shaped attention layer, 2 x 4096 tokens: {ours_gib:.2f} GiB and {ours_ms:.1f} ms with heads ")
    print(f"expanded, {math_gib:.2f} GiB and {math_ms:.1f} ms as transformers does; kernels {sorted(ours)}")
    assert ours
    assert not theirs
    assert math_gib > 2 * ours_gib


def test_peft_s_preparation_widens_what_stays_16_bit(tmp_path):
    from peft import prepare_model_for_kbit_training

    from llamanb.data.encode import load_tokenizer
    from llamanb.model import load_model

    folder = make_checkpoint("1b", tmp_path / "1b")
    held_before = torch.cuda.memory_allocated()
    model = load_model(plan(Recipe(model=str(folder)), T4), load_tokenizer(folder))
    ours = (torch.cuda.memory_allocated() - held_before) / 2**30
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    theirs = (torch.cuda.memory_allocated() - held_before) / 2**30
    print(f"\n1B after loading: {ours:.3f} GiB, and {theirs:.3f} GiB after prepare_model_for_kbit_training")
    assert theirs > ours + 0.4


def test_auto_dtype_is_bf16(mini, tmp_path):
    from transformers import AutoModelForCausalLM

    from llamanb.data.encode import load_tokenizer
    from llamanb.model import load_model

    folder = make_checkpoint("mini", tmp_path / "bf16")
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    ours = load_model(plan(Recipe(model=str(folder), method="lora"), T4), load_tokenizer(folder))
    assert {p.dtype for p in ours.parameters()} == {torch.float16}


def test_expandable_segments_asked_for_too_late_are_told():
    code = """
import torch
torch.zeros(1, device="cuda")
import llamanb
from llamanb.training.trainer import warn_of_gaps
warn_of_gaps()
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": env, "check": True}
    late = subprocess.run([sys.executable, "-c", code], **options)
    assert "restart the kernel" in late.stderr
    in_time = subprocess.run([sys.executable, "-c", f"import llamanb{code}"], **options)
    assert "restart" not in in_time.stderr
