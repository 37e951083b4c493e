"""A token goes to the Hub and nowhere else: not into files, outputs, logs, cards or reports, plain or in base64."""

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamanb import Recipe
from llamanb.errors import RecipeError
from tests.adapted import adapted_run
from tests.hub_server import Fault, Hub
from tests.unit.test_hub import endpoint  # noqa: F401

ROOT = Path(__file__).parents[2]
CANARY = "hf_" + "CanaryThatSings" + "0123456789abcdefg"


def traces(secret: str) -> list[bytes]:
    """A secret as it may stand in a file: plain, and in base64 after any number of other bytes."""
    found = [secret.encode()]
    for before in range(3):
        text = base64.b64encode(bytes(before) + secret.encode())
        found.append(text[-(-8 * before // 6) : len(text) - 4])  # without letters that hold bits of neighbours
    return found


def places(secret: str, *folders: Path) -> list[str]:
    """Files in which it stands."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(trace in path.read_bytes() for trace in traces(secret))]


@pytest.mark.parametrize("before", range(4))
def test_a_canary_is_found_where_one_is(tmp_path, before):
    (tmp_path / "plain").write_text(f"{'x' * before}{CANARY} and more")
    (tmp_path / "encoded").write_bytes(base64.b64encode(b"x" * before + CANARY.encode() + b"and more"))
    (tmp_path / "other").write_bytes(base64.b64encode(b"nothing of the kind in here, however long it may be"))
    assert sorted(places(CANARY, tmp_path)) == [str(tmp_path / "encoded"), str(tmp_path / "plain")]


TRAINS = """
from llamanb import *
from llamanb.card import Card
from llamanb.gpu_check import check_gpu
recipe = Recipe(max_length=256, steps=2, eval_rows=2, checkpoint_every_steps=1, effective_batch_size=2)
p = plan(recipe, Card("CPU", None))
print(recipe, p, p._repr_html_())
run = train(p, second_home="home")
print(run, run._repr_html_(), run.files(), show_run("home/run"), load_adapter(run.folder)[1])
train(plan(recipe.replace(steps=3), Card("CPU", None)), resume=True, second_home="/nowhere/at/all")
report = check_gpu()
print(report, report._repr_html_())
"""
REFUSED = """
import logging, traceback
logging.basicConfig(level=logging.DEBUG)
from llamanb import *
from llamanb import hub
from llamanb.errors import RecipeError
from tests.adapted import adapted_run
from tests.hub_server import Fault, Hub
for name in ("meta-llama/Llama-3.2-1B", "meta-llama/no-token", "owner/misspelled", "owner/wrong-token", "owner/good",
             "owner/no-revision", "owner/broken", "owner/huge", "owner/pickled"):
    try:
        hub.checkpoint_folder(name)
        load_data(Recipe(model="tiny", dataset=name, max_length=128))
    except Exception as error:
        traceback.print_exc()
        print(error, getattr(error, "_repr_html_", str)())
        print("\\n".join(traceback.TracebackException.from_exception(error, capture_locals=True).format()))
for make in (lambda: Recipe(model="{0}"), lambda: Recipe(dataset="https://me:{0}@example.org/rows.jsonl")):
    try:
        make()
    except RecipeError as error:
        print(error, error._repr_html_())
"""
PUSHES = """
import logging, sys, traceback
logging.basicConfig(level=logging.DEBUG)
from llamanb import push
for repo, options in (("me/notes", {}), ("me/notes", {"dry_run": False}), ("me/notes", {"dry_run": False}),
                      ("them/notes", {"dry_run": False}), ("me/refused", {"dry_run": False})):
    try:
        sent = push("run", repo, **options)
        print(repr(sent), sent._repr_html_(), sent.commit)
    except Exception as error:
        traceback.print_exc()
        print(error, error._repr_html_())
        print("\\n".join(traceback.TracebackException.from_exception(error, capture_locals=True).format()))
"""


@pytest.mark.parametrize("field", ["model", "dataset", "revision", "dataset_split"])
@pytest.mark.parametrize(
    "value", [CANARY, f"x/{CANARY}", "https://me:secret@example.org/x.jsonl", f"https://{CANARY}@x/y"]
)
def test_a_recipe_holds_no_token_and_does_not_repeat_it(field, value):
    with pytest.raises(RecipeError, match=f"{field} holds a token or a password") as caught:
        Recipe(**{field: value})
    assert "secret" not in str(caught.value) + caught.value._repr_html_()
    assert CANARY not in str(caught.value) + caught.value._repr_html_()


@pytest.mark.parametrize(
    "value", ["owner/hf_model", "https://example.org/@me/x.jsonl", "me@home/x.jsonl", "hf_small_rows.csv"]
)
def test_a_name_that_looks_a_little_like_one_is_fine(value):
    assert Recipe(dataset=value).dataset == value


def say(code: str, folder: Path, endpoint: str) -> subprocess.CompletedProcess:  # noqa: F811
    """Runs the code in `folder`/here with the canary as token; what it says is in `folder` too."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = {**keep, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_TOKEN": CANARY}
    env |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "HF_DEBUG": "1", "CUDA_VISIBLE_DEVICES": ""}
    said = code.replace("{0}", CANARY)
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, cwd=folder / "here", env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "output").write_bytes(done.stdout + b"\n" + done.stderr)
    assert len(done.stdout) > 500
    return done


@pytest.mark.slow
@pytest.mark.parametrize("code", [TRAINS, REFUSED], ids=["a training", "what the Hub refuses"])
def test_the_token_stays_where_it_is(tmp_path, endpoint, code):  # noqa: F811
    (tmp_path / "here").mkdir()
    done = say(code, tmp_path, endpoint)
    assert code != REFUSED or b"authorization: <TOKEN>" in done.stderr, "the client had it, and its log says so"
    assert places(CANARY, tmp_path) == []


@pytest.mark.slow
def test_a_push_tells_the_token_to_the_hub_alone(tmp_path):
    adapted_run(tmp_path / "here" / "run", method="lora", rank=4, max_length=128)
    with Hub() as hub:
        hub.account(CANARY)
        hub.faults = [Fault("POST", "me/refused/preupload", times=99, status=403, error="no")]
        done = say(PUSHES, tmp_path, hub.endpoint)
        contents = [content for repo in hub.repos.values() for _, content in repo.files.values()]
    assert b"authorization: <TOKEN>" in done.stderr, "the client had it, and its log says so"
    assert b"WrongTokenError" in done.stdout
    assert len(contents) > 5
    assert not any(trace in content for trace in traces(CANARY) for content in contents)
    assert places(CANARY, tmp_path) == []
