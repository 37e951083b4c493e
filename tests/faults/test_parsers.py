"""Manifests and recipes of any content: what is wrong with them is said, or they do not count; nothing else is raised.

`make faults` makes 100,000 of them, CI 2,000: any bytes, any JSON, and what was right with a part of it replaced.
"""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamanb import Card, Recipe, plan, show_run
from llamanb.errors import LlamanbError, RecipeError
from llamanb.run import Run
from llamanb.timeline import Timeline
from llamanb.training.checkpoints import ASIDE, MANIFEST, commit, newest
from llamanb.training.resume import CHECKPOINTS, pick_up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
EXAMPLES = int(os.environ.get("LLAMANB_KILLS", "10")) * 200 // 4
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)

numbers = st.integers() | st.integers(-(10**400), 10**400) | st.floats() | st.sampled_from([0, -0.0, 1e308, 2**63])
plain = st.none() | st.booleans() | numbers | st.text() | st.sampled_from(["", "tiny", "../x", "all-linear", "\0"])
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)
deep = st.integers(1, 200_000).map(lambda depth: b"[" * depth)
long_number = st.integers(1, 10_000).map(lambda digits: b'{"step": ' + b"9" * digits + b"}")


def written(value) -> bytes:
    """JSON with everything that Python's own reader takes, such as NaN and half a surrogate pair."""
    return json.dumps(value).encode()


@st.composite
def spoiled(draw, right: dict) -> bytes:
    """What was right, with some of its values replaced, at any depth, and perhaps cut off."""
    value = json.loads(json.dumps(right))
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while isinstance(place, dict) and place:
            key = draw(st.sampled_from(sorted(place)) | st.text(max_size=3))
            if isinstance(place.get(key), dict) and draw(st.booleans()):
                place = place[key]
                continue
            place[key] = draw(anything)
            break
    text = written(value)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


def contents(right: dict):
    return st.binary(max_size=200) | anything.map(written) | deep | long_number | spoiled(right)


RECIPE = dataclasses.asdict(Recipe())
CPU = Card("CPU", None)
TINY = Recipe(max_length=64)
PLAN = json.loads(plan(TINY, CPU).to_json())


@many
@given(contents(RECIPE))
def test_a_recipe_is_one_or_says_what_it_is_not(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "recipe.json"
    path.write_bytes(content)
    with contextlib.suppress(RecipeError):
        assert Recipe.from_json(Recipe.load(path).to_json()) == Recipe.load(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of an unfinished run with one checkpoint."""
    made = tmp_path_factory.mktemp("runs") / "run"
    aside = made / CHECKPOINTS / ASIDE / "checkpoint-3"
    aside.mkdir(parents=True)
    (aside / "optimizer.pt").write_bytes(b"x")
    commit(aside, made / CHECKPOINTS, 3)
    return made


MANIFESTED = {"step": 3, "files": {"optimizer.pt": {"bytes": 1, "sha256": "0" * 64}}}


@many
@given(contents(MANIFESTED))
def test_a_manifest_holds_or_does_not(folder, content):
    manifest = folder / CHECKPOINTS / "step-00000003" / MANIFEST
    right = manifest.read_bytes()
    try:
        manifest.write_bytes(content)
        assert newest(folder / CHECKPOINTS) is None
    finally:
        manifest.write_bytes(right)
    assert newest(folder / CHECKPOINTS)


@many
@given(contents(PLAN), contents({"status": "running", "train_s": 1.0, "buckets_gib": {}, "versions": {}}))
def test_a_run_s_own_words_end_in_a_run_or_a_new_one(folder, content, facts):
    (folder / "plan.json").write_bytes(content)
    (folder / "run.json").write_bytes(facts)
    with contextlib.suppress(RecipeError), contextlib.ExitStack() as held:
        pick_up(plan(TINY, CPU), folder.parent, "run", None, held)


@many
@given(contents(PLAN), contents({"status": "running", "train_s": 1.0, "buckets_gib": {}, "versions": {}}))
def test_a_run_that_cannot_be_shown_says_so(tmp_path_factory, content, facts):
    made = tmp_path_factory.getbasetemp() / "shown"
    made.mkdir(exist_ok=True)
    Run(made, plan(TINY, CPU), Timeline("none")).save()
    (made / "plan.json").write_bytes(content)
    (made / "run.json").write_bytes(facts)
    with contextlib.suppress(LlamanbError):
        assert show_run(made).folder == made
