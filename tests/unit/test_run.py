"""The folder that a training leaves, and what can be shown of it: at once, later, and when the run did not end well."""

import gc
import json
import shutil
import weakref

import pytest

from llamanb import Card, Recipe, load_data, plan, show_run, train
from llamanb.errors import RecipeError
from llamanb.model import load_model
from llamanb.report import write_report
from llamanb.run import FINISHED, RUNNING, Run, new_folder, newest_folder
from llamanb.timeline import Timeline
from llamanb.watch.live import LiveView
from tests.unit.fake_run import run_on_a_t4

pytestmark = pytest.mark.whole

CPU = Card("CPU", None)
FILES = ("plan.json", "run.json", "timeline.json", "memory.csv", "metrics.csv")


@pytest.fixture(scope="module")
def recipe(mini, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": f"Say {n}.", "output": f"It is {n}."}) for n in range(12)))
    fields = {"model": str(mini), "dataset": str(path), "max_length": 128, "effective_batch_size": 4, "steps": 3}
    return lambda **more: Recipe(**{**fields, "method": "lora", "eval_rows": 2, "learning_rate": 1e-2, **more})


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory) -> Run:
    """A run as train() returned it, with one sample, so that none comes after its files were written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llamanb.watch.sampler.INTERVAL_S", 3600.0)
        return train(plan(recipe(), CPU), name="mine", runs=tmp_path_factory.mktemp("runs"))


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of its folder, to be spoiled."""
    return shutil.copytree(trained.folder, tmp_path / "run")


def same(opened: Run, run: Run) -> None:
    """Everything that is shown of two runs is the same."""
    assert opened.plan == run.plan
    assert (opened.losses, opened.timeline.steps) == (run.losses, run.timeline.steps)
    assert opened.timeline.samples == run.timeline.samples
    assert opened.scores == run.scores
    facts = ("folder", "saved", "status", "train_s", "buckets_gib", "versions", "peak_gib")
    assert {name: getattr(opened, name) for name in facts} == {name: getattr(run, name) for name in facts}
    for picture in ("loss_plot", "memory_plot", "peaks_plot"):
        assert repr(getattr(opened, picture)) == repr(getattr(run, picture))
    assert (str(opened), str(opened.files())) == (str(run), str(run.files()))
    assert opened._repr_html_() == run._repr_html_()


def test_a_run_is_the_same_when_it_is_opened_again(trained):
    assert trained.status == FINISHED
    assert trained.train_s > 0
    assert set(trained.versions) >= {"llamanb", "torch", "trl"}
    same(show_run(trained.folder), trained)
    same(Run.open(str(trained.folder)), trained)


def test_so_is_one_on_a_gpu(tmp_path):
    run = run_on_a_t4(tmp_path)
    same(Run.open(tmp_path), run)
    words = repr(run.peaks_plot)
    for part in run.plan.memory.parts:
        assert f"{run.timeline.peaks_gib[part]:.2f} measured" in words
    assert "score" not in words, "nothing was planned for it"


def test_without_a_gpu_there_are_no_peaks(trained):
    assert trained.peaks_plot is None
    assert "host memory" in repr(trained.memory_plot)


def test_a_run_in_words_and_pictures(trained):
    assert str(trained).startswith("3 steps in ")
    assert str(trained).endswith(f"GiB; in {trained.folder}")
    page = trained._repr_html_()
    assert page.count("<img ") == 2
    assert "loss per token" in page


def test_a_run_whose_rows_are_few_has_no_scores_and_opens(tmp_path):
    run = run_on_a_t4(tmp_path)
    (tmp_path / "scores.json").unlink()
    opened = show_run(tmp_path)
    assert opened.scores is None
    assert opened.losses == run.losses
    with pytest.raises(RecipeError, match="nothing to compare"):
        opened.compare()


def test_a_run_may_be_opened_from_where_one_stands(trained, monkeypatch):
    monkeypatch.chdir(trained.folder.parent)
    assert show_run("mine").folder == trained.folder


def refused(path) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        show_run(path)
    error = caught.value
    assert error.what == f"{path} holds no run that can be shown"
    assert "\n" not in error.why
    assert "train()" in error.fix
    return error


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    assert "plan.json" in refused(tmp_path).why
    assert "plan.json" in refused(tmp_path / "nowhere").why
    refused(__file__)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_named(folder, name):
    (folder / name).unlink()
    assert name in refused(folder).why


BROKEN = [b"", b"{", b"null", b"5", b'"text"', b"[]", b"[1]", b'{"x": 1}', b"\xff\xfe"]


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("name", ["plan.json", "run.json", "timeline.json", "scores.json"])
def test_a_file_that_is_broken_is_one_clear_error(folder, name, text):
    (folder / name).write_bytes(text)
    refused(folder)


@pytest.mark.parametrize("value", [5, "text", [1], {"x": 1}, {"model": 3}])
@pytest.mark.parametrize("field", ["recipe", "card", "memory", "time", "alternatives"])
def test_a_plan_with_a_broken_field_is_one_clear_error(tmp_path, field, value):
    run_on_a_t4(tmp_path)
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(json.dumps({**json.loads(plan_file.read_text()), field: value}))
    refused(tmp_path)


@pytest.mark.parametrize("card", [{"vram_gib": -1.0}, {"capability": [7]}, {"attention": ["none"]}])
def test_a_card_that_cannot_be_is_one_clear_error(tmp_path, card):
    run_on_a_t4(tmp_path)
    plan_file = tmp_path / "plan.json"
    fields = json.loads(plan_file.read_text())
    fields["card"] |= card
    plan_file.write_text(json.dumps(fields))
    refused(tmp_path)


@pytest.mark.parametrize("name", ["memory.csv", "metrics.csv"])
def test_a_table_that_holds_words_is_one_clear_error(folder, name):
    header = (folder / name).read_text().splitlines()[0]
    (folder / name).write_text(f"{header}\n{header}\n")
    refused(folder)


def failing(monkeypatch, error, at_step: int = 2) -> None:
    """From then on a training fails at the end of that step."""
    on_log = LiveView.on_log

    def fails(self, args, state, control, **kwargs):
        on_log(self, args, state, control, **kwargs)
        if state.global_step == at_step:
            raise error

    monkeypatch.setattr(LiveView, "on_log", fails)


def test_an_interrupted_run_can_be_shown(recipe, tmp_path, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(plan(recipe(), CPU), name="run", runs=tmp_path)
    run = show_run(tmp_path / "run")
    assert run.status == "ended by KeyboardInterrupt"
    assert [step.step for step in run.timeline.steps] == [1, 2]
    assert run.scores is None
    assert str(run).startswith("2 steps, the first one's end ")
    assert f" {run.timeline.steps[0].time_s:.0f} s after the start, at most " in str(run)
    assert "(ended by KeyboardInterrupt)" in str(run)
    assert "at step 2;" in repr(run.loss_plot)
    assert "(ended by KeyboardInterrupt)" in run._repr_html_()
    assert "ended by KeyboardInterrupt" in write_report(run).read_text()
    assert {"recipe.json", "metrics.csv", "memory.csv"} <= {name for name, _ in run.files().rows}


def test_a_run_that_was_killed_can_be_shown(folder, trained):
    """It said last what it did then, and its tables end in the middle of a line."""
    for name in ("report.html", "scores.json"):
        (folder / name).unlink()
    (folder / "run.json").write_text(json.dumps({"status": RUNNING, "train_s": 0.0, "buckets_gib": {}, "versions": {}}))
    metrics = (folder / "metrics.csv").read_bytes()
    (folder / "metrics.csv").write_bytes(metrics[:-7])
    run = show_run(folder)
    assert run.losses == trained.losses[:-1]
    assert "(running)" in str(run)
    write_report(run)


def test_a_run_that_was_killed_before_its_first_step_can_be_shown(tmp_path):
    run = run_on_a_t4(tmp_path).replace(timeline=Timeline("fake"), scores=None, status=RUNNING, train_s=0.0)
    run = run.replace(buckets_gib={}, versions={})
    (tmp_path / "scores.json").unlink()
    run.save()
    opened = show_run(tmp_path)
    assert str(opened).startswith("0 steps, at most 0.00 GiB (running)")
    assert "no sample yet" in repr(opened.memory_plot)
    assert "no step yet" in repr(opened.loss_plot)
    write_report(opened)


@pytest.fixture
def models(monkeypatch):
    """Weak references to every model that is loaded, and to its embedding."""
    found, load = [], load_model

    def watched(*args, **kwargs):
        model = load(*args, **kwargs)
        found.extend([weakref.ref(model), weakref.ref(model.get_input_embeddings().weight)])
        return model

    monkeypatch.setattr("llamanb.model.load_model", watched)
    return found


def test_a_run_that_is_over_keeps_no_model_alive(recipe, tmp_path, models):
    run = train(plan(recipe(), CPU), name="run", runs=tmp_path)
    assert run.losses
    assert [reference() for reference in models] == [None, None], "the next cell may load another one"


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_8bit"])
@pytest.mark.parametrize("error", [RuntimeError("it broke"), KeyboardInterrupt()], ids=repr)
def test_a_run_that_fails_keeps_no_model_alive(recipe, tmp_path, monkeypatch, models, error, optimizer):
    failing(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        train(plan(recipe(optimizer=optimizer), CPU), name="run", runs=tmp_path)
    assert caught.value.__traceback__ is not None, "the error, and with it its frames, is still there"
    assert len(models) == 2
    assert [reference() for reference in models] == [None, None]


@pytest.mark.parametrize(
    "where", ["llamanb.evaluate.evaluate", "llamanb.model.attach_adapters", "llamanb.model.save_model"]
)
def test_nor_does_one_that_fails_around_its_training(recipe, tmp_path, monkeypatch, models, where):
    def fails(model, *args, **kwargs):
        try:
            raise ValueError(model.device)
        except ValueError:
            raise MemoryError from None

    monkeypatch.setattr(where, fails)
    with pytest.raises(MemoryError) as caught:
        train(plan(recipe(), CPU), name="run", runs=tmp_path)
    assert caught.value.__traceback__ is not None
    assert [reference() for reference in models] == [None, None]


def test_nor_does_an_error_with_a_cause_that_had_the_model_at_hand(recipe, tmp_path, monkeypatch, models):
    def deep_inside(model):
        raise ValueError(model.device)

    def fails(self, args, state, control, model=None, **kwargs):
        try:
            deep_inside(model)
        except ValueError as cause:
            raise RuntimeError("it broke") from cause

    monkeypatch.setattr(LiveView, "on_log", fails)
    with pytest.raises(RuntimeError) as caught:
        train(plan(recipe(), CPU), name="run", runs=tmp_path)
    assert isinstance(caught.value.__cause__, ValueError)
    assert [reference() for reference in models] == [None, None]


def test_a_run_that_ends_keeps_no_model_alive_either(recipe, tmp_path, models):
    run = train(plan(recipe(), CPU), name="run", runs=tmp_path)
    gc.collect()
    assert run.losses
    assert [reference() for reference in models] == [None, None]


def test_what_fails_after_training_is_said_and_keeps_what_was_seen(recipe, tmp_path, monkeypatch):
    def fails(*args):
        raise MemoryError

    monkeypatch.setattr("llamanb.evaluate.compare", fails)
    with pytest.raises(MemoryError):
        train(plan(recipe(), CPU), name="run", runs=tmp_path)
    run = show_run(tmp_path / "run")
    assert run.status == "ended by MemoryError"
    assert len(run.losses) == 3
    assert list(run.saved.glob("*.safetensors"))


def test_files_are_complete_at_the_end(recipe, tmp_path, monkeypatch):
    """What is written every few seconds is written once more."""
    monkeypatch.setattr("llamanb.watch.sampler.WRITE_S", 3600.0)
    run = train(plan(recipe(), CPU), name="run", runs=tmp_path)
    again = Timeline.read(run.folder)
    assert again.steps == run.timeline.steps
    assert len(again.steps) == 3
    assert again.samples == run.timeline.samples[: len(again.samples)]


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", "", ".hidden", "a\nb", "x" * 200, None])
def test_a_run_stays_in_its_folder(tmp_path, name):
    with pytest.raises(RecipeError, match="cannot be named"):
        new_folder(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_ends_like_a_number_is_a_name_of_its_own(tmp_path):
    made = [new_folder(tmp_path, name).name for name in ("exp", "exp-2", "exp", "exp-2", "exp")]
    assert made == ["exp", "exp-2", "exp-3", "exp-2-2", "exp-4"]
    assert [newest_folder(tmp_path, name).name for name in ("exp", "exp-2")] == ["exp-4", "exp-2-2"]
    for look in (new_folder, newest_folder):
        with pytest.raises(RecipeError, match="exp-3 is a run of 'exp'"):
            look(tmp_path, "exp-3")
    (tmp_path / "exp-5").mkdir()  # nobody noted for whom
    assert newest_folder(tmp_path, "exp").name == "exp-5"
    for name in ("renamed", "exp-1", "exp-77"):
        (tmp_path / "exp-4").rename(tmp_path / name)
        assert newest_folder(tmp_path, name).name == name
        (tmp_path / name).rename(tmp_path / "exp-4")


def test_a_run_never_writes_over_another(recipe, tmp_path):
    p, data = plan(recipe(steps=1), CPU), load_data(recipe())
    folders = [train(p, data, name="same", runs=tmp_path).folder.name for _ in range(3)]
    assert folders == ["same", "same-2", "same-3"]
