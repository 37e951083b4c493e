"""Fine-tune Llama 3 on the GPU you have.

The public names load on first use, so `import llamanb` is quick and brings in neither torch nor matplotlib.
"""

import importlib
import os

__version__ = "0.1.0"
REPOSITORY = "https://github.com/llamanb/llamanb"
"""Where the project lives: badge, setup cells and model cards are held equal to it by a test."""

# Before torch makes its allocator: segments that grow leave no gaps between sizes. A setting of the user's own stays.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

_HOME = {
    "Recipe": "recipe",
    "starter_recipe": "starter",
    "Card": "card",
    "Plan": "layout",
    "plan": "planner",
    "rehearse": "rehearsal",
    "trainable": "reach",
    "load_data": "data",
    "train": "training",
    "Run": "run",
    "show_run": "run",
    "load_adapter": "model",
    "answer": "generate",
    "Chat": "chat",
    "chat_form": "ui.chat_form",
    "side_by_side": "chat",
    "merge": "export",
    "to_gguf": "export",
    "load_merged": "export",
    "same_answers": "export",
    "push": "export",
    "launch": "scale.launch",
    "recipe_form": "ui",
    "plan_form": "ui",
    "LlamanbError": "errors",
}
__all__ = [*_HOME, "REPOSITORY", "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'llamanb' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llamanb.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
