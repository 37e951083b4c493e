"""Factors against the best there can be, ranks against the budget, and what is made of them: loaded, trained, saved."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamanb import Recipe, tiny
from llamanb.architecture import architecture
from llamanb.errors import DataError, ModelError, RecipeError
from llamanb.recipe import LINEAR_LAYERS
from llamanb.run import Run
from llamanb.shrink import absorb, load_factored, write_factored, write_products
from llamanb.shrink.factored import Factored, key, parameters
from llamanb.shrink.low_rank import choose_ranks, outputs
from llamanb.shrink.write import facts_of
from tests.adapted import adapted_run
from tests.checkpoints import make_checkpoint
from tests.shrunken import dense, fresh_logits, inputs_of, linear, logits, rows


@pytest.fixture
def factor(mini, tmp_path):
    def factor(name="out", **fields):
        fields = {"data": rows(), **fields}
        return write_factored(Recipe(model=str(fields.pop("model", mini))), tmp_path / name, **fields)

    return factor


@pytest.mark.parametrize("shape", [(40, 64), (64, 64), (96, 48)])
@pytest.mark.parametrize("tokens", [500, 20])  # fewer than the width: their products are singular
def test_no_product_of_that_rank_gives_nearer_outputs(shape, tokens):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    x = torch.randn(tokens, shape[1]) * torch.logspace(0, -3, shape[1])
    energies, up = outputs(weight, x.T @ x / tokens, 10)
    exact = torch.linalg.svdvals((x @ weight.T).double())
    assert torch.allclose(energies[:15].double(), exact[:15] ** 2 / tokens, rtol=1e-3)
    assert torch.allclose(up.T @ up, torch.eye(10), atol=1e-5)
    lost = (x @ (weight - up @ (up.T @ weight)).T).double().square().sum()
    assert lost.item() == pytest.approx(exact[10:].square().sum().item(), rel=1e-3)  # Eckart and Young


def test_without_calibration_it_is_the_plain_decomposition():
    torch.manual_seed(0)
    for shape in ((40, 64), (96, 48)):
        weight = torch.randn(shape)
        energies, up = outputs(weight, None, 7)
        u, s, v = torch.linalg.svd(weight)
        assert torch.allclose(energies, s**2, rtol=1e-3)
        assert torch.allclose(up @ (up.T @ weight), u[:, :7] * s[:7] @ v[:7], atol=1e-4)


def test_ranks_keep_the_budget_and_go_where_the_energy_is():
    shape = architecture("tiny")
    torch.manual_seed(0)
    flat = {key(i, name): torch.ones(min(shape.linear(name))) for i in range(2) for name in LINEAR_LAYERS}
    steep = {k: (torch.arange(len(e)).float().neg() / 4).exp() if k.startswith("1") else e for k, e in flat.items()}
    total, before = 2 * shape.layer_linear_parameters, {}
    for budget in (0.1, 0.2, 0.5, 0.8, 0.95):
        ranks = choose_ranks(steep, shape, budget)
        kept = parameters(ranks, shape) / total
        assert budget - 0.01 < kept <= budget
        assert all(ranks[k] == 0 or ranks[k] >= rank > 0 for k, rank in before.items()), "more budget, no lower rank"
        before = {k: rank for k, rank in ranks.items() if rank}
    half = choose_ranks(steep, shape, 0.5)
    for name in LINEAR_LAYERS:
        assert 0 < half[key(1, name)] < 40  # all that matters lies in its first directions
        assert half[key(0, name)] == 0 or half[key(0, name)] > half[key(1, name)]
    m, n = shape.linear("k_proj")
    for rank in choose_ranks(flat, shape, 0.9).values():
        assert rank == 0 or rank < m * n / (m + n) * 4


def test_the_factors_are_the_best_for_what_the_factored_layers_give(factor, mini):
    """As far as 32 bits show: the second layer's inputs are those that the factored first one gives."""
    folder, model, data = factor(rank=9), dense(mini), rows()
    made = load_factored(folder)
    for number, layer in enumerate(model.model.layers):
        for name in LINEAR_LAYERS:
            x, weight = inputs_of(model, data, number, name), linear(layer, name).weight.detach()
            product = linear(made.model.layers[number], name)
            product = (product.up.weight @ product.down.weight).detach()
            best = torch.linalg.svdvals((x @ weight.T).double())[9:].square().sum().item()
            assert (x @ (weight - product).T).double().square().sum().item() == pytest.approx(best, rel=0.01)
        for name in LINEAR_LAYERS:
            product = linear(made.model.layers[number], name)
            linear(layer, name).weight = torch.nn.Parameter(product.up.weight @ product.down.weight)
    assert torch.allclose(logits(model), logits(made), atol=1e-5)


@pytest.mark.slow
def test_factors_and_products_load_in_a_fresh_process_and_agree(factor, tmp_path):
    """Also after an adapter was taken in: product and adapter in peft's hands, and factors of rank k + r."""
    folder = factor(model="tiny", budget=0.6, data=rows(vocabulary=1000))
    ranks = facts_of(folder)["ranks"]
    assert {bool(rank) for rank in ranks.values()} == {True, False}  # some stay whole
    products = write_products(folder, tmp_path / "products")
    adapted = adapted_run(tmp_path / "run", model=str(products), method="lora", rank=4, alpha=8.0, max_length=128)
    absorbed = absorb(tmp_path / "run", folder, tmp_path / "absorbed")

    wanted = [logits(load_factored(folder)), logits(dense(products)), logits(adapted)]
    found = fresh_logits(folder, products, absorbed)
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    assert torch.allclose(found[1], wanted[1], atol=1e-5)
    assert torch.allclose(found[0], found[1], atol=0.02)  # the product's own rounding to 16 bits
    assert torch.allclose(found[2], wanted[2], atol=0.02)
    assert (wanted[2] - wanted[1]).abs().max() > 0.2  # the adapter does something
    assert facts_of(absorbed)["ranks"] == {k: rank and rank + 4 for k, rank in ranks.items()}

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    shape = architecture("tiny")
    rest = shape.parameters - shape.layers * shape.layer_linear_parameters
    assert size == pytest.approx(2 * (rest + parameters(ranks, shape)), rel=0.02)
    plain = sum(path.stat().st_size for path in products.glob("*.safetensors"))
    assert plain == pytest.approx((tiny.CHECKPOINT / "model.safetensors").stat().st_size, rel=0.01)


def test_a_plain_loader_refuses_factors_instead_of_making_weights_up(factor):
    folder = factor()
    with pytest.raises(ValueError, match="llamanb_factored"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ModelError, match="'llamanb_factored' model, not a Llama"):
        write_factored(Recipe(model=str(folder)), folder.with_name("again"), data=rows())


def test_factors_train_and_are_saved_and_loaded(factor, tmp_path):
    folder = factor(budget=0.4)
    model = load_factored(folder).train()
    factored = [layer for layer in model.modules() if isinstance(layer, Factored)]
    ids = torch.tensor([list(range(50, 80))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        assert all(layer.down.weight.grad.norm() > 0 and layer.up.weight.grad.norm() > 0 for layer in factored)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = load_factored(folder)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(logits(again), logits(model.eval()))


def test_one_rank_for_all_leaves_whole_what_it_would_make_larger(factor, mini):
    folder = factor(rank=30)
    whole = {name for name in LINEAR_LAYERS if facts_of(folder)["ranks"][key(0, name)] == 0}
    assert whole == {"k_proj", "v_proj"}  # 64 x 32: 21 at most
    before, after = dense(mini), load_factored(folder)
    for name in whole:
        assert torch.equal(linear(after.model.layers[0], name).weight, linear(before.model.layers[0], name).weight)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"budget": 0.0}, "budget = 0.0 is not possible"),
        ({"budget": 1}, "between 0 and 1"),
        ({"budget": 0.01}, r"too small[\s\S]*rank 1 for every matrix"),
        ({"rank": 33}, r"the full rank of k_proj is 32[\s\S]*from 1 to 32"),
        ({"rank": 0}, "rank = 0 is not possible"),
        ({"rank": 2.5}, "rank = 2.5"),
    ],
)
def test_what_cannot_be_is_named_before_anything_is_written(factor, tmp_path, fields, words):
    with pytest.raises(RecipeError, match=words):
        factor(**fields)
    assert not list(tmp_path.iterdir())


def test_a_rank_that_makes_nothing_smaller(factor, tmp_path):
    base = make_checkpoint("mini", tmp_path / "square", num_key_value_heads=4, intermediate_size=64)
    with pytest.raises(RecipeError, match=r"makes nothing smaller[\s\S]*rank = 31 at most"):
        factor(model=base, rank=32)


def test_rows_missing_a_taken_folder_and_no_factors(factor, mini, tmp_path):
    with pytest.raises(DataError, match="calibration rows are missing"):
        factor(data=None)
    assert factor(data=None, whiten=False).is_dir()
    with pytest.raises(RecipeError, match="is there already"):
        factor()
    with pytest.raises(RecipeError, match="is there already"):
        write_products(tmp_path / "out", tmp_path / "out")
    for folder in (mini, tmp_path / "nothing"):
        with pytest.raises(ModelError, match="holds no factored Llama"):
            load_factored(folder)
        with pytest.raises(ModelError, match="holds no factored Llama"):
            write_products(folder, tmp_path / "products")


def test_a_file_that_is_not_there(factor):
    folder = factor()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(name for name in index["weight_map"] if "o_proj" in name)
    (folder / index["weight_map"].pop(name)).rename(folder / "away")
    with pytest.raises(ModelError, match="not complete"):
        load_factored(folder)


def test_an_adapter_of_something_else_is_not_taken_in(factor, mini, tmp_path):
    folder = factor()
    products = write_products(folder, tmp_path / "products")
    adapted_run(tmp_path / "other", model=str(mini), method="lora", rank=4)
    with pytest.raises(RecipeError, match="is no shrunken checkpoint"):
        absorb(tmp_path / "other", folder, tmp_path / "absorbed")
    another = factor("another", budget=0.3)
    adapted_run(tmp_path / "right", model=str(products), method="lora", rank=4)
    with pytest.raises(RecipeError, match="holds no products of these factors"):
        absorb(tmp_path / "right", another, tmp_path / "absorbed")
    adapted_run(tmp_path / "dora", model=str(products), method="lora", rank=4, dora=True)
    with pytest.raises(ModelError, match="DoRA"):
        absorb(tmp_path / "dora", folder, tmp_path / "absorbed")
    assert absorb(Run.open(tmp_path / "right"), folder, tmp_path / "absorbed").is_dir()
