"""Shrunken models for tests: rows to calibrate on, and what a fresh process makes of a checkpoint."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import torch
from transformers import LlamaForCausalLM

from llamanb.recipe import LINEAR_LAYERS

IDS = list(range(40, 90))
_FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from llamanb.shrink import load_factored
found = []
for folder in sys.argv[1:]:
    plain = json.load(open(f"{folder}/config.json"))["model_type"] == "llama"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) if plain else load_factored(folder)
    with torch.no_grad():
        found.append(model(torch.tensor([%s])).logits[0].tolist())
print(json.dumps(found))
"""


def rows(count: int = 24, vocabulary: int = 250):
    """Rows of uneven length, as far as calibration looks at them."""
    rng = random.Random(0)
    made = [[rng.randrange(1, vocabulary) for _ in range(rng.randint(5, 40))] for _ in range(count)]
    return SimpleNamespace(train=[SimpleNamespace(input_ids=ids) for ids in made])


def dense(folder) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def fresh_logits(*folders) -> list[torch.Tensor]:
    """Of each checkpoint, loaded by a process that made none of them."""
    command = [sys.executable, "-c", _FRESH % IDS, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [torch.tensor(found) for found in json.loads(done.stdout.splitlines()[-1])]


def linear(layer, name: str) -> torch.nn.Linear:
    return getattr(layer.self_attn if name in LINEAR_LAYERS[:4] else layer.mlp, name)


def inputs_of(model, data, number: int, name: str) -> torch.Tensor:
    """(tokens, in): what a linear layer of the whole model is given over all rows, one row at a time."""
    seen = []
    watched = linear(model.model.layers[number], name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0])
    )
    with torch.no_grad():
        for row in data.train:
            model(torch.tensor([row.input_ids]))
    watched.remove()
    return torch.cat(seen)
