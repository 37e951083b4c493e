"""Rehearsals on a GPU: python -m pytest tests/gpu/test_rehearsal_gpu.py -s"""

import pytest

from llamanb import Card, Recipe, plan, rehearse
from llamanb.errors import GpuError

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
RECIPE = Recipe(model="meta-llama/Llama-3.2-1B-Instruct", max_length=1024, effective_batch_size=8, eval_rows=0)


def test_a_rehearsal_finds_what_was_predicted_and_leaves_nothing_on_the_gpu():
    made = plan(RECIPE.replace(checkpointing="all"), Card.present())
    rehearse(made)  # what CUDA and cuBLAS keep is there from here on
    before = torch.cuda.memory_allocated()
    rehearsed = rehearse(made)
    assert torch.cuda.memory_allocated() == before
    assert rehearsed.layers == made.layers
    assert rehearsed.memory.allocated == pytest.approx(made.memory.allocated, rel=0.02)
    assert rehearsed.time.measured_s > 0
    print(f"\npredicted {made.memory.allocated / 2**30:.3f}, rehearsed {rehearsed.memory.allocated / 2**30:.3f} GiB")


def test_another_card_than_the_one_here_is_refused():
    with pytest.raises(GpuError, match="cannot be rehearsed here"):
        rehearse(plan(RECIPE, "RTX 3060"))
