"""Pushes to a Hub on this machine: what goes up, what comes down again, and what each refusal says."""

import json
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llamanb import merge, push, to_gguf
from llamanb.errors import ModelError
from llamanb.export import shards
from llamanb.export.model_card import CARD, NOTICE
from llamanb.export.push import PushError
from llamanb.export.stored import MissingShardError
from llamanb.run import Run
from tests.adapted import adapted_run
from tests.checkpoints import make_checkpoint
from tests.hub_server import Hub
from tests.unit.hostile import NAMES, STRINGS

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "TheTokenOfTests" + "0123456789abcdefg"
IDS = torch.arange(40, 90)[None]
REPO = "me/Llama-3.1-notes"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ADAPTER = {CARD, NOTICE, "adapter_config.json", "adapter_model.safetensors", *TOKENIZER}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, its model, and what was made of it: in several shards, and a GGUF."""
    folder = tmp_path_factory.mktemp("made")
    base = make_checkpoint("mini", folder / "Llama-3.1-mini")
    model = adapted_run(folder / "run", model=str(base), method="lora", rank=4, dataset="tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 60_000)
        to_gguf(merge(folder / "run"))
    return folder, model


@pytest.fixture
def run(made, tmp_path):
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(made[0] / "run", tmp_path / "run"))


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the client would have waited."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@pytest.fixture
def hub(monkeypatch, waits):
    with Hub() as server:
        server.account(TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def fetched(hub, folder, repo=REPO) -> Path:
    return Path(snapshot_download(repo, endpoint=hub.endpoint, cache_dir=folder, token=TOKEN))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def refused(kind, what, repo=REPO, **options) -> str:
    """What the error says, with the token nowhere in it."""
    options = {"dry_run": False, **options}
    with pytest.raises(kind) as caught:
        push(what, repo, **options)
    error = caught.value
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    assert TOKEN not in f"{error} {error._repr_html_()} {error!r} {''.join(shown.format())}"
    assert error.fix
    return str(error)


# What goes up


def test_a_dry_run_shows_everything_and_asks_nobody(made, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    shown = push(made[0] / "run", REPO)
    assert hub.requests == []
    assert shown.files.keys() == ADAPTER
    assert shown.commit == ""
    for text in (str(shown), shown._repr_html_()):
        assert f"would be sent to {hub.endpoint}/{REPO}; dry_run = False sends it (private; " in text
        assert all(name in text for name in ADAPTER)
        assert "Built with Llama" in text
        assert "save https://www.llama.com/llama3_1/license/ as LICENSE beside the weights" in text
        assert "is on this machine alone" in text
    assert f"{(made[0] / 'run' / 'adapter' / 'adapter_model.safetensors').stat().st_size / 1e3:.3g} kB" in str(shown)


def test_an_adapter_and_back(made, hub, tmp_path):
    folder, model = made
    sent = push(Run.open(folder / "run"), REPO, dry_run=False)
    assert sent.commit.startswith(f"{hub.endpoint}/{REPO}/commit/")
    assert "sent to" in str(sent)
    assert hub.repos[REPO].private
    assert hub.repos[REPO].files.keys() == ADAPTER
    back = fetched(hub, tmp_path)
    for path in (folder / "run" / "adapter").iterdir():
        if path.name != CARD:
            assert (back / path.name).read_bytes() == path.read_bytes()
    base = AutoModelForCausalLM.from_pretrained(folder / "Llama-3.1-mini", dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(base, back)), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora-nf4"])
def test_the_card_s_own_lines_load_it(method, hub, tmp_path):
    model = adapted_run(tmp_path / "run", method=method, rank=4, max_length=128)
    push(tmp_path / "run", "me/notes", dry_run=False)
    card = hub.repos["me/notes"].files[CARD][1].decode()
    lines = card.split("```python\n")[1].split("```")[0]
    assert '"me/notes"' in lines
    end = (
        "import torch\nwith torch.no_grad():\n    torch.save(model.eval()(torch.arange(40, 90)[None]).logits, 'logits')"
    )
    env = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", lines + end], check=True, env=env, cwd=tmp_path, capture_output=True)
    wanted, close = logits(model), 1e-6 if method == "lora" else 2e-2  # on some CPUs bitsandbytes multiplies in bf16
    assert (torch.load(tmp_path / "logits") - wanted).abs().max() < close * wanted.abs().max()


@pytest.mark.parametrize("part_bytes", [0, 10_000], ids=["one PUT a file", "in parts"])
def test_a_merged_model_and_back(made, hub, part_bytes, tmp_path):
    hub.part_bytes = part_bytes
    merged = made[0] / "run" / "merged"
    push(merged, REPO, private=False, dry_run=False)
    assert not hub.repos[REPO].private
    names = hub.repos[REPO].files.keys()
    assert sum(name.startswith("model-0") for name in names) > 2
    assert {path.name for path in merged.iterdir()} - names == {"merge.json"}, "which may say where a base lies"
    assert len(hub.repos[REPO].commits) == 1, "all of it, or nothing"
    back = LlamaForCausalLM.from_pretrained(fetched(hub, tmp_path), dtype=torch.float32)
    assert torch.equal(logits(back), logits(LlamaForCausalLM.from_pretrained(merged, dtype=torch.float32)))


def test_a_gguf_and_back(made, hub, tmp_path):
    file = made[0] / "run" / "merged-f16.gguf"
    sent = push(file, REPO, dry_run=False)
    assert sent.files.keys() == {CARD, NOTICE, "merged-f16.gguf", "merged-f16.Modelfile"}
    assert f"hf download {REPO} --local-dir model" in sent.card
    back = fetched(hub, tmp_path)
    assert (back / "merged-f16.Modelfile").read_text() == file.with_suffix(".Modelfile").read_text()
    config = LlamaForCausalLM.from_pretrained(made[0] / "run" / "merged").config
    there, here = (
        AutoModelForCausalLM.from_pretrained(place, gguf_file=file.name, config=config, dtype=torch.float32)
        for place in (back, file.parent)
    )
    assert torch.equal(logits(there), logits(here))


@pytest.mark.parametrize("name", ["start", "adapter"])
def test_what_lies_beside_weights_that_are_not_the_same_without_it_is_remarked(run, name):
    merged = run / "merged"
    before = push(merged, REPO)
    (merged / name).mkdir()
    shown = push(merged, REPO)
    assert shown.files.keys() == before.files.keys()
    (remark,) = set(shown.remarks) - set(before.remarks)
    assert str(merged / name) in remark
    assert "is not sent" in remark


def test_a_gguf_without_a_modelfile_or_a_card(made, hub, tmp_path):
    shutil.copy(made[0] / "run" / "merged-f16.gguf", tmp_path / "Llama-3.2-x.gguf")
    shown = push(tmp_path, REPO)
    assert shown.files.keys() == {CARD, NOTICE, "Llama-3.2-x.gguf"}
    assert any("no Modelfile" in remark for remark in shown.remarks)
    assert "Llama 3.2 Community License" in shown.card


def test_a_whole_model_of_a_run(run, hub):
    shutil.rmtree(run / "adapter")
    shutil.copytree(run / "merged", run / "model")
    plan = json.loads((run / "plan.json").read_text())
    plan["recipe"]["method"] = "full"
    (run / "plan.json").write_text(json.dumps(plan))
    assert push(run, REPO).kind == "merged or whole model"


def test_nothing_else_that_lies_there_goes_up(run, hub, tmp_path):
    adapter = run / "adapter"
    (tmp_path / "private.json").write_text("private")
    (adapter / "chat_template.jinja").unlink()
    (adapter / "chat_template.jinja").symlink_to(tmp_path / "private.json")
    others = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "memory_snapshot.pickle", ".env"]
    for name in (*others, ".git-credentials", "notes.txt", "recipe.json", "run.json.new", "adapter_model.bin", "x.py"):
        (adapter / name).write_text("x")
    (adapter / "checkpoint-1").mkdir()
    (adapter / "checkpoint-1" / "adapter_model.safetensors").write_text("x")
    push(adapter, REPO, dry_run=False)
    assert hub.repos[REPO].files.keys() == ADAPTER - {"chat_template.jinja"}
    assert str(tmp_path).encode() not in hub.repos[REPO].files[CARD][1]


def test_what_was_written_into_the_card_goes_up(run, hub):
    card = run / "adapter" / CARD
    card.write_text(card.read_text() + "\n## Mine\n\nSee YOUR_NAME/THIS_MODEL.\n", encoding="utf-8")
    push(run, REPO, dry_run=False)
    assert hub.repos[REPO].files[CARD][1].decode().endswith(f"## Mine\n\nSee {REPO}.\n")
    card.write_text("---\nlicense: llama3.1\n---\n# Mine")
    assert any("'Built with Llama'" in remark for remark in push(run, REPO).remarks)
    card.write_text("---\nlicense: mit\n---\n# Mine")
    assert NOTICE in push(run, REPO).files, "what the base is under, the card cannot change"
    card.unlink()
    assert "A LoRA adapter for `Llama-3.1-mini`" in push(run / "adapter", REPO).card
    alone = (run / "adapter").rename(run.parent / "alone")
    assert "An adapter for `Llama-3.1-mini`" in push(alone, REPO).card


def test_a_copy_of_the_licence_goes_up_too(run, hub):
    (run / "adapter" / "LICENSE").write_text("the agreement")
    shown = push(run, REPO)
    assert "LICENSE" in shown.files
    assert not any("LICENSE" in remark for remark in shown.remarks)


# Meta's rule for names


@pytest.mark.parametrize("name", ["notes", "my-Llama-3.1-notes", "Lama-notes"])
def test_a_name_that_the_licence_does_not_allow(made, hub, name):
    said = refused(PushError, made[0] / "run", f"me/{name}", private=False, dry_run=True)
    assert f"me/Llama-{name}" in said
    assert "Llama 3.1 Community License" in said
    shown = push(made[0] / "run", f"me/{name}")
    assert any("begins with Llama" in remark for remark in shown.remarks), "a private one is shown to nobody"


@pytest.mark.parametrize("name", ["Llama-notes", "llama_notes", "LLaMA3"])
def test_a_name_that_it_does(made, hub, name):
    assert not any("begins with" in remark for remark in push(made[0] / "run", f"me/{name}", private=False).remarks)


def test_llama_3_wants_its_number_too(run, hub):
    (run / "adapter" / CARD).write_text("---\nlicense: llama3\n---\n# Mine")
    assert "me/Llama-3-Llama-notes" in refused(PushError, run, "me/Llama-notes", private=False)
    assert push(run, "me/Llama3-notes", private=False).files[NOTICE].startswith(b"Meta Llama 3 is licensed")


# What cannot be pushed


@pytest.mark.parametrize(
    "name",
    ["notes", "/notes", "me/", "me/a/b", "me/-a", "me/a-", "me/a--b", "me/a..b", "me/.a", "me/a.git", "me/" + "a" * 99,
     "me/a b", "me/ä", None, 3, *NAMES],
)  # fmt: skip
def test_a_name_that_is_none(made, hub, name):
    assert "cannot be named" in refused(PushError, made[0] / "run", name)
    assert hub.requests == []


def test_a_token_in_the_card_or_for_a_name(run, hub):
    for name in (TOKEN, f"me/{TOKEN}", f"{TOKEN}/x"):
        with pytest.raises(PushError, match="holds a token") as caught:
            push(run, name)
        assert TOKEN not in f"{caught.value!r} {caught.value._repr_html_()}"
    with (run / "adapter" / CARD).open("a") as card:
        card.write(f"login(token='{TOKEN}')")
    with pytest.raises(PushError, match="holds a Hugging Face token"):
        push(run, REPO)


def test_a_password_in_the_endpoint_is_not_shown(made, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://user:pass" + "word@hub.example")
    shown = push(made[0] / "run", REPO)
    assert f"would be sent to https://hub.example/{REPO}; " in str(shown)
    assert "password" not in str(shown) + shown._repr_html_()


def test_hostile_names_are_refused_or_text(made, hub):
    for text in STRINGS:
        with pytest.raises(PushError, match="cannot be named"):
            push(made[0] / "run", text)


@pytest.mark.parametrize("status", ["running", "out of memory", "ended by ValueError"])
def test_a_run_that_has_not_finished(run, hub, status):
    facts = json.loads((run / "run.json").read_text()) | {"status": status}
    (run / "run.json").write_text(json.dumps(facts))
    assert status in refused(PushError, run)
    assert any(status in remark for remark in push(run / "adapter", REPO).remarks), "asked for by its own folder"


def test_a_run_that_was_stopped_says_so(run, hub):
    facts = json.loads((run / "run.json").read_text()) | {"status": "stopped after 30 minutes"}
    (run / "run.json").write_text(json.dumps(facts))
    assert any("stopped after 30 minutes" in remark for remark in push(run, REPO).remarks)


def test_a_run_without_weights(run, hub):
    shutil.rmtree(run / "adapter")
    assert "no trained weights" in refused(PushError, run)


def test_weights_that_are_cut_off_or_missing(run, hub):
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(MissingShardError, run)
    next((run / "merged").glob("model-00002*")).unlink()
    refused(MissingShardError, run / "merged")


def test_weights_that_are_links_or_of_another_name(run, hub, tmp_path):
    file = run / "adapter" / "adapter_model.safetensors"
    file.rename(tmp_path / "weights")
    file.symlink_to(tmp_path / "weights")
    assert "is a link" in refused(PushError, run)
    file.unlink()
    (tmp_path / "weights").rename(file.with_name("others.safetensors"))
    assert "others.safetensors" in refused(PushError, run)


def test_what_is_no_model(run, hub, tmp_path):
    assert "no such file" in refused(PushError, tmp_path / "nothing")
    assert "no model" in refused(PushError, tmp_path)
    (tmp_path / "x.gguf").write_text("text")
    assert "no GGUF file" in refused(PushError, tmp_path / "x.gguf")
    (tmp_path / "y.gguf").symlink_to(run / "merged-f16.gguf")
    assert "is a link" in refused(PushError, tmp_path / "y.gguf")
    for name in ("a b.gguf", "a$(x).gguf"):
        shutil.copy(run / "merged-f16.gguf", tmp_path / name)
        assert "no name for the Hub" in refused(PushError, tmp_path / name)
    assert "a b.gguf" in refused(PushError, tmp_path), "several: which?"
    (run / "adapter" / "adapter_config.json").write_text("[")
    refused(ModelError, run)
