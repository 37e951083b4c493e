"""Checkpoints, configs, tokenizers and adapters that someone else wrote: nothing of them runs."""

import ast
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

from llamanb import Card, Recipe, hub, load_adapter, plan, train
from llamanb.data.encode import load_tokenizer
from llamanb.errors import LlamanbError, ModelError
from llamanb.model import load_model
from llamanb.training.checkpoints import MANIFEST, facts, newest
from llamanb.training.resume import CHECKPOINTS
from tests.unit.hostile import NAMES

ROOT = Path(__file__).parents[2]
CPU = Card("CPU", None)
MARK = "pwned"
TOUCH = f"import pathlib; pathlib.Path({MARK!r}).touch()"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """In a folder of its own, where what runs leaves its mark; the Hub is out of reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llamanb.hub.require_network", unreachable)
    yield tmp_path
    assert not (tmp_path / MARK).exists(), "it ran"


def unreachable(what):
    raise LlamanbError(what, "no network", "none")


# --- what may run when it is read


class Runs:
    """Pickled, it runs when it is read."""

    def __reduce__(self):
        return exec, (TOUCH,)


class Calls:
    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


class Built:
    """As tensors are built, from a function that is no tensor's."""

    def __reduce__(self):
        return getattr, (Runs(), "x")


def as_torch(payload, path):
    torch.save(payload, path)


def as_old_torch(payload, path):
    torch.save(payload, path, _use_new_zipfile_serialization=False)


def as_pickle(payload, path):
    path.write_bytes(pickle.dumps(payload))


def hidden(payload, path):
    """Among states that are what they should be."""
    torch.save({"state": {}, "param_groups": [{"lr": payload}], "python": payload}, path)


WAYS = (as_torch, as_old_torch, as_pickle, hidden)


@pytest.fixture(scope="module")
def unfinished(mini, tmp_path_factory) -> Path:
    """The folder of runs, one of which was cut off at its second step of three."""
    base = tmp_path_factory.mktemp("unfinished")
    rows = base / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": f"Say {n}.", "output": f"It is {n}."}) for n in range(8)))
    fields = {"model": str(mini), "dataset": str(rows), "max_length": 128, "effective_batch_size": 4, "eval_rows": 0}
    recipe = Recipe(**fields, steps=2, method="lora", checkpoint_every_steps=1)
    run = train(plan(recipe, CPU), runs=base / "runs")
    run.replace(plan=plan(recipe.replace(steps=3), CPU), status="running").save()
    (run.folder / "plan.json").write_text(plan(recipe.replace(steps=3), CPU).to_json())
    return base


def plant(checkpoint: Path, name: str, payload, way) -> None:
    """Puts a file into a checkpoint, with a manifest that vouches for it: who can write one can write the other."""
    way(payload, checkpoint / name)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = facts(checkpoint / name)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


PLACES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin")
PICKLES = [(name, way, Runs) for name in PLACES for way in WAYS]
PICKLES += [(name, as_torch, payload) for name in PLACES[:4] for payload in (Calls, Built)]
QUICK = ("optimizer.pt", "training_args.bin")


@pytest.mark.parametrize(
    ("name", "way", "payload"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case[0] not in QUICK or case[1:] != (as_torch, Runs)))
        for case in PICKLES
    ],
)
def test_no_pickle_in_a_checkpoint_runs(unfinished, tmp_path, name, way, payload):
    shutil.copytree(unfinished / "runs", tmp_path / "runs")
    checkpoint = newest(tmp_path / "runs" / "run" / CHECKPOINTS)
    plant(checkpoint, name, payload(), way)
    assert newest(checkpoint.parent) == checkpoint
    recipe = Recipe.load(unfinished / "runs" / "run" / "recipe.json").replace(steps=3)
    if name == "training_args.bin":  # nobody reads it
        assert len(train(plan(recipe, CPU), runs=tmp_path / "runs").losses) == 3
    else:
        with pytest.raises(ModelError, match=f"{checkpoint / name} is not what .*; nothing in it was run") as caught:
            train(plan(recipe, CPU), runs=tmp_path / "runs")
        assert f"remove {checkpoint} to go on from the one before it" in caught.value.fix


def test_the_payloads_would_run_if_they_were_let(tmp_path):
    for payload in (Runs, Calls):
        for way in WAYS[:2]:
            way(payload(), tmp_path / "file")
            torch.load(tmp_path / "file", weights_only=False)
            (tmp_path / MARK).unlink()


@pytest.mark.parametrize("module", ["transformers.trainer", "trl.trainer.sft_trainer", "accelerate.checkpointing"])
def test_each_load_of_the_trainer_s_is_of_weights_only(module):
    """GPU paths too, such as a scaler's state, which no test here comes by."""
    import importlib.util

    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert loads or module != "transformers.trainer"
    for node in loads:
        assert "weights_only=True" in ast.unparse(node), f"{module}:{node.lineno}"


def test_the_package_loads_no_pickle_itself():
    """But to see whether it is one: numbers alone."""
    found = []
    for path in (ROOT / "llamanb").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        loads = {"torch.load", "pickle.load", "pickle.loads", "eval", "exec", "os.system", "__import__"}
        found += [(path.name, ast.unparse(node)) for node in calls if ast.unparse(node.func) in loads]
        assert "trust_remote_code" not in path.read_text()
    assert [(name, "weights_only=True" in call) for name, call in found] == [("resume.py", True)]


# --- checkpoints of others


@pytest.fixture
def checkpoint(mini, tmp_path) -> Path:
    """A copy of a checkpoint that loads, beside weights that are not its own."""
    shutil.copytree(mini, tmp_path / "model")
    (tmp_path / "outside").mkdir()
    save_file(load_file(mini / "model.safetensors"), tmp_path / "outside" / "x.safetensors", metadata={"format": "pt"})
    (tmp_path / "model" / "evil.py").write_text(TOUCH)
    (tmp_path / "evil.py").write_text(TOUCH)
    return tmp_path / "model"


def load(folder: Path):
    recipe = Recipe(model=str(folder), max_length=64, method="lora")
    tokenizer = load_tokenizer(hub.checkpoint_folder(recipe.model))
    return load_model(plan(recipe, CPU), tokenizer)


def change(path: Path, **fields) -> None:
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(there | fields))


def shards(folder: Path, name) -> None:
    """Weights that are said to lie in a file of that name."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


CONFIGS = {
    "code for the config": {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
    "code from the Hub": {"auto_map": {"AutoConfig": "someone/evil--evil.Config"}},
    "another config": {"configuration_files": ["config.4.0.0.json"]},
    "pickled weights": {"transformers_weights": "adapter_model.bin"},
    "other weights": {"transformers_weights": "../outside/x.safetensors"},
    "another architecture": {"model_type": "evil", "architectures": ["Evil"]},
}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_would_have_other_code_or_weights_read_is_refused(checkpoint, fields, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: "y")  # transformers asks a person whether to run it
    torch.save(Runs(), checkpoint / "adapter_model.bin")
    change(checkpoint / "config.4.0.0.json", model_type="evil", auto_map=CONFIGS["code for the config"]["auto_map"])
    change(checkpoint / "config.json", **fields)
    with pytest.raises(ModelError) as caught:
        load(checkpoint)
    assert "evil" not in sys.modules
    assert str(checkpoint) in caught.value.what


def test_one_that_lies_beside_an_adapter_is_refused(checkpoint):
    change(checkpoint / "adapter_config.json", peft_type="LORA", base_model_name_or_path="../outside", r=4)
    torch.save(Runs(), checkpoint / "adapter_model.bin")
    with pytest.raises(ModelError, match="other code or weights"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_not_read_under_either_name(checkpoint, name):
    (checkpoint / "model.safetensors").unlink()
    torch.save(Runs(), checkpoint / name)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(checkpoint)


TOKENIZERS = {
    "code": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}},
    "other files": {"tokenizer_file": "../outside/tokenizer.json", "vocab_file": "/etc/passwd"},
    "a template that reaches for Python": {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}"},
    "a template that never ends": {"chat_template": "{% for i in range(10**9) %}{{ i }}{% endfor %}"},
}


@pytest.mark.parametrize("fields", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_runs_nothing(checkpoint, fields):
    change(checkpoint / "tokenizer_config.json", **fields)
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer("x").input_ids == load_tokenizer(checkpoint)("x").input_ids
    assert "evil" not in sys.modules
    if "chat_template" in fields:
        with pytest.raises(Exception, match=r"unsafe|Range too big"):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("name", [f"{name}{end}" for name in NAMES for end in ("", "/x.safetensors")])
def test_shards_lie_in_their_folder(checkpoint, name):
    (checkpoint.parent / "up").symlink_to(checkpoint.parent / "outside")
    shards(checkpoint, name)
    with pytest.raises(ModelError, match="other code or weights"):
        load(checkpoint)


def test_and_load_from_there(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    shutil.copy(checkpoint / "model-00001-of-00001.safetensors", checkpoint / "model.safetensors")
    shards(checkpoint, "model-00001-of-00001.safetensors")
    assert load(checkpoint)


@pytest.mark.parametrize("maps", [{}, {"weight_map": []}, {"weight_map": {"x": 3}}, {"weight_map": {"x": None}}, [], 3])
def test_a_shard_map_of_any_kind_is_no_surprise(checkpoint, maps):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(maps))
    with pytest.raises(ModelError):
        load(checkpoint)


# --- adapters of others


@pytest.fixture(scope="module")
def adapted(mini, tmp_path_factory) -> Path:
    """A finished run."""
    base = tmp_path_factory.mktemp("adapted")
    recipe = Recipe(model=str(mini), method="lora", steps=1, eval_rows=0, max_length=128)
    rows = base / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "Say 1.", "output": "It is 1."}))
    return train(plan(recipe.replace(dataset=str(rows)), CPU), runs=base).folder


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_config": {"x": 1}, "megatron_core": "evil"},
        {"peft_type": "XLORA", "adapters": {"0": "someone/evil"}, "hidden_size": 64},
        {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "evil"},
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}},
        {"base_model_name_or_path": "../outside"},
        {"target_modules": "(a+)+$" * 20},
        {"init_lora_weights": "eva", "rank_pattern": {"(a+)+$": 10**9}},
    ],
    ids=lambda fields: next(iter(fields)) + str(fields.get("peft_type", "")),
)
def test_what_an_adapter_says_of_itself_is_not_asked(adapted, tmp_path, fields):
    shutil.copytree(adapted, tmp_path / "run")
    (tmp_path / "evil.py").write_text(TOUCH)
    whole, _ = load_adapter(adapted)
    change(tmp_path / "run" / "adapter" / "adapter_config.json", **fields)
    model, _ = load_adapter(tmp_path / "run")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert "evil" not in sys.modules


@pytest.mark.parametrize("decoy", [None, "x.safetensors", "ADAPTER_MODEL.safetensors"])
def test_a_pickled_adapter_is_refused(adapted, tmp_path, decoy):
    shutil.copytree(adapted, tmp_path / "run")
    saved = tmp_path / "run" / "adapter"
    if decoy:
        shutil.copy(saved / "adapter_model.safetensors", saved / decoy)
    (saved / "adapter_model.safetensors").unlink()
    torch.save(Runs(), saved / "adapter_model.bin")
    with pytest.raises(ModelError, match="holds no trained weights"):
        load_adapter(tmp_path / "run")


# --- versions


def test_versions_with_known_holes_are_not_taken():
    """torch before 2.10 and transformers before 5.3 run what is in a file that they load."""
    wanted = {r.name: r for line in (ROOT / "requirements.txt").read_text().splitlines() if (r := _requirement(line))}
    for name, too_old in (("torch", "2.9.1"), ("transformers", "5.2.0")):
        assert too_old not in wanted[name].specifier
    assert (ROOT / "pyproject.toml").read_text().count('file = ["requirements.txt"]') == 1


def _requirement(line: str) -> Requirement | None:
    return Requirement(line) if line and not line.startswith("#") else None
