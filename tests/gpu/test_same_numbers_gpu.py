"""Every layout learns in fp16 what trl's trainer learns with transformers' and peft's layers and padded rows, and rows
end to end have the logits that each has alone: pytest tests/gpu/test_same_numbers_gpu.py -s

Four layers of Llama 3.2 1B's shape with random 4-bit weights.
"""

from dataclasses import replace

import pytest

from llamanb import Card
from llamanb.architecture import architecture
from llamanb.planner import search
from llamanb.tape import STORED
from tests.same_numbers import BATCHES, LAYOUTS, PASS, as_planned, furthest, layers, plainly, random_rows, recipe

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
MODEL, DEPTH, LONGEST, VOCABULARY = "meta-llama/Llama-3.2-1B-Instruct", 4, 256, 2000
SHAPE = replace(architecture(MODEL), layers=DEPTH)
FP16, FP32 = 1e-2, 1e-5
SOME = ["1 x 4 even rows", "1 x 4 uneven rows", "8 x 1 row", "8 x 2 uneven rows"]


def planned(batch, precision, kernel):
    asked = recipe(BATCHES[batch], LONGEST, model=MODEL, precision=precision, checkpointing="none", learning_rate=5e-4)
    plan = search(asked, replace(Card.present(), name="here"), SHAPE, force=True)
    assert plan.fused
    return plan.replace(kernel=kernel, layers=(STORED,) * DEPTH)


def tokenizer():
    from llamanb.rehearsal import _tokenizer

    return _tokenizer()


def made(plan):
    from llamanb.model import attach_adapters, load_model

    return attach_adapters(load_model(plan, tokenizer(), SHAPE), plan.recipe)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """Plan, rows, and what trl shows for them, by batch."""
    found = {}

    def of(batch):
        if batch not in found:
            plan, rows = planned(batch, "fp16", "memory-efficient"), random_rows(BATCHES[batch], LONGEST, VOCABULARY)
            folder = tmp_path_factory.mktemp("plain")
            found[batch] = plan, rows, plainly(made(plan), tokenizer(), rows, plan.recipe, folder, fp16=True)
        return found[batch]

    return of


@pytest.fixture(scope="module")
def again():
    """`again(plan)`: one model for all, its adapters as they were made."""
    model = made(planned(SOME[0], "fp16", "memory-efficient"))
    first = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def of(plan):
        for name, parameter in model.named_parameters():
            if name in first:
                parameter.data, parameter.grad = first[name].clone(), None
        return model

    return of


@pytest.mark.parametrize("batch", SOME)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", ["memory-efficient", "flash"])
def test_loss_and_gradient_norm_of_each_step(right, again, tmp_path, kernel, layout, batch):
    plan, rows, expected = right(batch)
    assert expected[PASS].loss < expected[0].loss, "something is learned of the same rows"
    plan = plan.replace(kernel=kernel, layers=layers(layout, DEPTH))
    apart = furthest(as_planned(plan, again, tokenizer(), rows, tmp_path), expected)
    print(f"{kernel}, {layout}, {batch}: loss {apart[0]:.1e}, gradient norm {apart[1]:.1e}")
    assert max(apart) <= FP16


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [[200] * 3, [256, 31, 200, 1, 64]], ids=["even", "uneven"])
def test_rows_end_to_end_have_the_logits_that_each_has_alone(lengths, layout):
    from llamanb.model.fused import FusedDecoder

    assert torch.get_float32_matmul_precision() == "highest"
    model = made(planned("1 x 1 row", "fp32", "memory-efficient")).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    ids = torch.randint(0, VOCABULARY, (sum(lengths),)).cuda()
    decoder = FusedDecoder(model, layers(layout, DEPTH), "memory-efficient")
    head, worst = model.get_output_embeddings().weight, 0.0
    with torch.no_grad(), decoder.step():
        together = decoder(ids, lengths).split(lengths)
        for row, hidden in zip(ids.split(lengths), together, strict=True):
            logits = hidden @ head.t()
            largest = logits.abs().max().item()
            for alone in (decoder(row, [len(row)]) @ head.t(), model(input_ids=row[None]).logits[0]):
                worst = max(worst, (logits - alone).abs().max().item() / largest)
    print(f"{layout}, {lengths}: {worst:.1e} of the largest logit")
    assert worst <= FP32
