import pytest

from llamanb import starter, starter_recipe, tiny
from llamanb.errors import NoNetworkError, RecipeError
from llamanb.recipe import Recipe


@pytest.fixture
def machine(monkeypatch):
    """`machine(gpu, network)`: what this machine has."""

    def set_up(gpu: bool, network: bool = True):
        def require_network(what):
            if not network:
                raise NoNetworkError(f"{what} cannot be fetched", "no network", "check it")

        monkeypatch.setattr(starter, "_has_gpu", lambda: gpu)
        monkeypatch.setattr(starter.hub, "require_network", require_network)

    return set_up


def test_without_a_gpu_it_is_the_tiny_default_as_it_was_tuned(machine):
    machine(gpu=False)
    recipe = starter_recipe()
    assert (recipe.model, recipe.dataset) == ("tiny", "tiny")
    assert {name: getattr(recipe, name) for name in tiny.DEFAULTS} == tiny.DEFAULTS


def test_with_a_gpu_it_is_a_real_llama_on_some_of_squad(machine):
    machine(gpu=True)
    recipe = starter_recipe()
    assert recipe.model == starter.LLAMA_1B
    assert (recipe.dataset, recipe.dataset_split) == ("rajpurkar/squad", "train[:2000]")
    assert recipe.learning_rate is None


def test_with_a_gpu_and_no_network_it_says_that_it_takes_the_tiny_one(machine, capsys):
    machine(gpu=True, network=False)
    assert starter_recipe().model == "tiny"
    assert "taking the tiny Llama instead" in capsys.readouterr().out


def test_own_rows_are_read_whole_with_the_recipes_own_defaults(machine):
    machine(gpu=True)
    recipe = starter_recipe(dataset="owner/rows")
    assert recipe == Recipe(model=starter.LLAMA_1B, dataset="owner/rows")
    recipe = starter_recipe(model="meta-llama/Llama-3.1-8B-Instruct", dataset="my_rows.jsonl")
    assert recipe == Recipe(model="meta-llama/Llama-3.1-8B-Instruct", dataset="my_rows.jsonl")


def test_own_rows_on_the_tiny_model_keep_what_suits_the_model_only(machine):
    machine(gpu=False)
    recipe = starter_recipe(dataset="my_rows.jsonl")
    assert (recipe.model, recipe.learning_rate) == ("tiny", tiny.DEFAULTS["learning_rate"])
    assert (recipe.max_length, recipe.steps) == (Recipe().max_length, None)


def test_what_is_given_comes_first_and_none_is_not_given(machine):
    machine(gpu=False)
    recipe = starter_recipe(rank=4, steps=None, method="lora")
    assert (recipe.rank, recipe.steps, recipe.method) == (4, tiny.DEFAULTS["steps"], "lora")


def test_a_given_model_needs_neither_gpu_nor_network(machine):
    machine(gpu=False, network=False)
    assert starter_recipe(model="owner/model").dataset == "rajpurkar/squad"


def test_a_wrong_field_is_an_error_as_ever(machine):
    machine(gpu=False)
    with pytest.raises(RecipeError, match="did you mean 'rank'"):
        starter_recipe(rnak=4)
