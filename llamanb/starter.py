"""A first recipe that runs where it is asked for: the tiny Llama on a CPU or offline, Llama 3.2 1B on a GPU."""

from __future__ import annotations

from llamanb import hub, tiny
from llamanb.errors import NoNetworkError
from llamanb.recipe import Recipe

TINY = {"model": "tiny", "dataset": "tiny", **tiny.DEFAULTS}
LLAMA_1B = {
    "model": "unsloth/Llama-3.2-1B-Instruct",  # the ungated copy of Meta's checkpoint: no token, no waiting
    "dataset": "rajpurkar/squad",
    "dataset_split": "train[:2000]",
    "max_length": 512,
    "long_rows": "skip",
    "steps": 60,
}


def starter_recipe(**wanted) -> Recipe:
    """A recipe with good first settings for this machine; fields that are given and not None come first.

    Without a GPU it takes the tiny Llama. With one it takes Llama 3.2 1B, or the tiny one where the Hub is out of
    reach, and prints which. Raises RecipeError like Recipe.
    """
    given = {name: value for name, value in wanted.items() if value is not None}
    if given.get("model", "tiny") != "tiny":
        return Recipe.from_dict({**_settings_for(given["model"]), **given})
    if given.get("model") == "tiny" or not _has_gpu():
        return Recipe.from_dict({**TINY, **given})
    try:
        hub.require_network(LLAMA_1B["model"])
    except NoNetworkError as error:
        print(f"{error.what}; taking the tiny Llama instead")
        return Recipe.from_dict({**TINY, **given})
    return Recipe.from_dict({**LLAMA_1B, **given})


def _settings_for(model: str) -> dict:
    """A real Llama on its own starter data; what was tuned to the tiny one does not apply."""
    return {name: value for name, value in LLAMA_1B.items() if name != "model"}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
