"""What a training leaves in a kernel that trains again and again."""

import gc
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from llamanb import Card, Recipe, plan, tiny
from llamanb.data.encode import load_tokenizer
from llamanb.export.stored import tensors
from llamanb.model import attach_adapters, load_model, save_model
from llamanb.training.saves import WEIGHTS, CheckpointedTrainer

PLAN = plan(Recipe(model="tiny", max_length=128), Card("CPU", None))


def left_by(call, times: int = 12) -> float:
    """Blocks of memory that each call leaves in Python's allocator, after as many in which caches fill."""
    for _ in range(times):
        call()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(times):
        call()
    gc.collect()
    return (sys.getallocatedblocks() - before) / times


def test_loading_the_tiny_llama_again():
    """Of a file that it maps, safetensors would leave two numbers for each tensor."""
    tokenizer = load_tokenizer(tiny.CHECKPOINT)
    assert left_by(lambda: load_model(PLAN, tokenizer)) < len(tensors(tiny.CHECKPOINT))


@pytest.mark.parametrize("method", ["qlora-nf4", "full"])
def test_going_on_from_a_checkpoint_again(tmp_path, method):
    saved = {f"layers.{n}.weight": torch.full((32, 32), float(n)) for n in range(40)}
    save_file(saved, tmp_path / WEIGHTS)
    trained = {name: torch.nn.Parameter(torch.zeros(32, 32)) for name in saved}
    trainer = SimpleNamespace(plan=PLAN.replace(recipe=PLAN.recipe.replace(method=method)), _trained=trained.items)
    assert left_by(lambda: CheckpointedTrainer._load_from_checkpoint(trainer, tmp_path)) < len(saved)
    assert all(torch.equal(trained[name], saved[name]) for name in saved)


def test_saving_an_adapter_compiles_no_template_for_a_card_that_is_replaced(tmp_path, monkeypatch):
    """Each time, that would use up 80 places in Python's table of names, which doubles when it is full."""
    monkeypatch.setattr(huggingface_hub.ModelCard, "from_template", lambda *args, **kwargs: pytest.fail("compiled"))
    tokenizer = load_tokenizer(tiny.CHECKPOINT)
    model = attach_adapters(load_model(PLAN, tokenizer), PLAN.recipe)
    saved = save_model(model, tokenizer, PLAN, tmp_path)
    assert "PEFT" not in (saved / "README.md").read_text()
