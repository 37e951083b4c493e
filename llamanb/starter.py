"""A first recipe that runs where it is asked for: the tiny Llama on a CPU or offline, Llama 3.2 1B on a GPU."""

from __future__ import annotations

from llamanb import hub, tiny
from llamanb.errors import NoNetworkError
from llamanb.recipe import Recipe

LLAMA_1B = "unsloth/Llama-3.2-1B-Instruct"
"""The ungated copy of Meta's checkpoint: no token, no waiting."""
SQUAD = {
    "dataset": "rajpurkar/squad",
    "dataset_split": "train[:2000]",
    "max_length": 512,
    "long_rows": "skip",
    "steps": 60,
}
"""A sample, for a first run. Other rows, where they are named, are read whole, with the recipe's own defaults."""
FOR_THE_MODEL = ("learning_rate", "schedule", "rank", "alpha")
"""What of the tiny Llama's settings belongs to the model, whatever it is trained on; the rest belongs to its rows."""


def starter_recipe(**wanted) -> Recipe:
    """A recipe with good first settings for this machine; fields that are given and not None come first.

    Without a GPU it takes the tiny Llama and its rows. With one it takes Llama 3.2 1B and SQuAD, or the tiny one where
    the Hub is out of reach, and says so. Raises RecipeError like Recipe.
    """
    given = {name: value for name, value in wanted.items() if value is not None}
    model = given.get("model") or _first_model()
    settings = {"model": model}
    if model == "tiny":
        settings |= {name: tiny.DEFAULTS[name] for name in FOR_THE_MODEL}
    if "dataset" not in given:
        given["dataset"] = "tiny" if model == "tiny" else SQUAD["dataset"]
        settings |= SQUAD if model != "tiny" else {}
    if given["dataset"] == "tiny":
        settings |= {name: value for name, value in tiny.DEFAULTS.items() if name not in FOR_THE_MODEL}
    return Recipe.from_dict({**settings, **given})


def _first_model() -> str:
    if not _has_gpu():
        return "tiny"
    try:
        hub.require_network(LLAMA_1B)
    except NoNetworkError as error:
        print(f"{error.what}; taking the tiny Llama instead")
        return "tiny"
    return LLAMA_1B


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
