"""Every layout learns what trl's trainer learns with transformers' and peft's layers and padded rows: loss and gradient
norm of each step in fp32, also after a resume."""

import functools

import pytest

from llamanb import Card, plan
from llamanb.data.encode import IGNORE, Encoded, load_tokenizer
from llamanb.model import attach_adapters, load_model
from llamanb.tape import CHECKPOINTED, OFFLOADED, STORED
from tests.checkpoints import make_checkpoint
from tests.same_numbers import BATCHES, LAYOUTS, PASS, as_planned, furthest, layers, plainly, random_rows, recipe

CPU = Card("CPU", None)
LONGEST, DEPTH, VOCABULARY = 24, 4, 500
WITHIN = 1e-5


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return make_checkpoint("mini", tmp_path_factory.mktemp("deep"), num_hidden_layers=DEPTH)


@pytest.fixture(scope="module")
def right(deep, tmp_path_factory):
    """`right(batch, method)`: recipe, rows, and what trl shows for them."""

    @functools.cache
    def of(batch: str, method: str):
        asked = recipe(BATCHES[batch], LONGEST, model=str(deep), method=method, rank=4)
        rows, tokenizer = random_rows(BATCHES[batch], LONGEST, VOCABULARY), load_tokenizer(deep)
        model = made(plan(asked, CPU))
        return asked, rows, plainly(model, tokenizer, rows, asked, tmp_path_factory.mktemp("plain"))

    return of


def made(of_plan):
    return attach_adapters(load_model(of_plan, load_tokenizer(of_plan.recipe.model)), of_plan.recipe)


def assert_same(right, folder, batch, kinds, *, fused=True, method="lora"):
    asked, rows, expected = right(batch, method)
    planned = plan(asked, CPU).replace(fused=fused, layers=kinds)
    seen = as_planned(planned, made, load_tokenizer(asked.model), rows, folder)
    assert expected[PASS].loss < 0.998 * expected[0].loss, "something is learned of the same rows"
    assert max(furthest(seen, expected)) <= WITHIN


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_layers(right, tmp_path, layout, batch):
    assert_same(right, tmp_path, batch, layers(layout, DEPTH))


@pytest.mark.parametrize("batch", ["1 x 4 uneven rows", "8 x 1 row"])
@pytest.mark.parametrize("kinds", [(CHECKPOINTED, STORED) * 2, (OFFLOADED, CHECKPOINTED) * 2])
def test_transformers_layers_as_a_plan_lays_them_out(right, tmp_path, kinds, batch):
    assert_same(right, tmp_path, batch, kinds, fused=False)


@pytest.mark.parametrize("layout", ["stored", "mixed"])
def test_over_4_bit_weights(right, tmp_path, layout):
    assert_same(right, tmp_path, "8 x 2 uneven rows", layers(layout, DEPTH), method="qlora-nf4")


def test_another_number_is_told_apart(right, tmp_path):
    """What the tests above would not let pass: one label more that is trained."""
    asked, rows, expected = right("8 x 2 uneven rows", "lora")
    first, labels = rows[0], list(rows[0].labels)
    at = labels.index(IGNORE, 1)
    labels[at] = first.input_ids[at]
    changed = [Encoded(first.input_ids, labels), *rows[1:]]
    planned = plan(asked, CPU).replace(fused=True, layers=layers("stored", DEPTH))
    seen = as_planned(planned, made, load_tokenizer(asked.model), changed, tmp_path)
    assert min(furthest(seen, expected)) > 10 * WITHIN
