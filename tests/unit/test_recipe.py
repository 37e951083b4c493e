import contextlib
import dataclasses
import inspect
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamanb.errors import LlamanbError, RecipeError
from llamanb.recipe import LINEAR_LAYERS, METHODS, Recipe


def test_default_recipe_survives_json():
    recipe = Recipe()
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": ["q_proj", "v_proj"], "rank": 8, "alpha": 16},
        {"method": "full", "learning_rate": 1e-5, "steps": 7},
        {"targets": "attention", "rslora": True, "dora": True},
        {"micro_batch_size": 2, "stop_after_min": 30, "epochs": 2},
    ],
)
def test_changed_recipe_survives_file(fields, tmp_path):
    recipe = Recipe(**fields)
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().rank = 8


def test_every_field_says_what_it_is():
    source = inspect.getsource(Recipe)
    for field in dataclasses.fields(Recipe):
        assert re.search(rf'\n    {field.name}: [^\n]+\n    """', source), f"{field.name} has no docstring"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": "8"}, "rank"),
        ({"rank": 8.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": None}, "rank"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"learning_rate": -1e-4}, "learning_rate"),
        ({"method": "nf4"}, "qlora-nf4"),
        ({"method": ["lora"]}, "method"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"precision": "fp8"}, "precision"),
        ({"double_quant": 1}, "double_quant"),
        ({"model": ""}, "model"),
        ({"model": "a\x00b"}, "model"),
        ({"dataset": 3}, "dataset"),
        ({"targets": "q_prj"}, "q_proj"),
        ({"targets": []}, "targets"),
        ({"targets": ["q_proj", 3]}, "targets"),
        ({"targets": ["lm_head"]}, "lm_head"),
        ({"micro_batch_size": 3}, "micro_batch_size = 2"),
        ({"method": "full", "dora": True}, "adapters"),
        ({"eval_rows": -1}, "eval_rows"),
        ({"stop_after_min": 0}, "stop_after_min"),
    ],
)
def test_wrong_field_is_named(fields, named):
    with pytest.raises(RecipeError, match=re.escape(named)) as caught:
        Recipe(**fields)
    assert caught.value.what
    assert caught.value.why
    assert caught.value.fix


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"rnak": 4}', '{"rank": null}', "[" * 5000])
def test_wrong_json_is_one_clear_error(text):
    with pytest.raises(RecipeError):
        Recipe.from_json(text)


def test_misspelled_field_gets_a_suggestion():
    with pytest.raises(RecipeError, match="did you mean 'rank'"):
        Recipe.from_dict({"rnak": 4})


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Recipe)]), st.none() | st.text() | st.floats())
)
def test_any_value_gives_a_recipe_or_one_error(fields):
    with contextlib.suppress(LlamanbError):
        recipe = Recipe.from_dict(fields)
        assert Recipe.from_json(recipe.to_json()) == recipe


def test_targets_as_papermill_passes_them():
    assert Recipe(targets="q_proj,v_proj").target_modules == ("q_proj", "v_proj")
    assert Recipe(targets="all-linear").target_modules == LINEAR_LAYERS
    assert Recipe(targets="attention").target_modules == LINEAR_LAYERS[:4]


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_means(method):
    recipe = Recipe(method=method)
    assert recipe.adapters == (method != "full")
    assert recipe.quantization == {"qlora-nf4": "nf4", "qlora-fp4": "fp4", "qlora-int8": "int8"}.get(method)


def test_alpha_follows_the_rank():
    assert Recipe(rank=32).lora_alpha == 32
    assert Recipe(rank=32, alpha=16).lora_alpha == 16


def test_flat_literals_only():
    json.dumps(dataclasses.asdict(Recipe()))  # what papermill can inject


@pytest.mark.parametrize("name", ["./hf_llama_3_8b_instruct_merged", "owner/hf_llama3_8b_instruct_converted"])
def test_a_name_that_begins_like_a_token_is_a_name(name):
    assert Recipe(model=name).model == name
    with pytest.raises(RecipeError, match="holds a token"):
        Recipe(model="owner/hf_" + "a1" * 17)
