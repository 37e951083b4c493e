import csv
import json
import math
import signal
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llamanb import Card, Recipe, answer, load_adapter, load_data, plan, plots, show_run, train
from llamanb.errors import ModelError, RecipeError
from llamanb.evaluate import evaluate
from llamanb.training.trainer import StopAfter, build_trainer, widen_trained
from tests.quick import SHORT_ANSWER

CPU = Card("CPU", None)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": f"Say {n}.", "output": f"It is {n}."}) for n in range(12)))
    return path


@pytest.fixture
def recipe(mini, rows):
    fields = {"model": str(mini), "dataset": str(rows), "max_length": 128, "effective_batch_size": 4, "steps": 3}
    return lambda **more: Recipe(**{**fields, "eval_rows": 2, "learning_rate": 1e-2, **more})


@pytest.mark.parametrize("method", ["qlora-nf4", "qlora-fp4", "qlora-int8", "lora", "full"])
def test_every_method_trains_saves_and_loads_again(recipe, tmp_path, method):
    run = train(plan(recipe(method=method, steps=12), CPU), name="run", runs=tmp_path / "runs")
    assert [step.step for step in run.timeline.steps] == list(range(1, 13))
    assert run.scores.after.loss < run.scores.before.loss
    model, tokenizer = load_adapter(run.folder)
    question = run.scores.questions[0]
    longest = min(16 + len(tokenizer(run.scores.references[0])["input_ids"]), SHORT_ANSWER)
    if method != "qlora-int8":  # its arithmetic depends on what else is in the batch
        assert answer(model, tokenizer, question, max_new_tokens=longest) == run.scores.after.answers[0]
    assert run.saved.name == ("model" if method == "full" else "adapter")


def test_a_run_s_folder_tells_all(recipe, tmp_path):
    run = train(plan(recipe(), CPU), name="mine", runs=tmp_path)
    assert run.folder == tmp_path / "mine"
    assert Recipe.load(run.folder / "recipe.json") == run.plan.recipe
    with (run.folder / "metrics.csv").open() as file:
        metrics = list(csv.DictReader(file))
    assert [int(row["step"]) for row in metrics] == [1, 2, 3]
    assert all(
        math.isfinite(float(row[column])) for row in metrics for column in ("loss", "learning_rate", "grad_norm")
    )
    with (run.folder / "memory.csv").open() as file:
        memory = list(csv.DictReader(file))
    assert all(float(row["used_gib"]) > 0 for row in memory)
    assert all(row["allocated_gib"] == row["reserved_gib"] == "" for row in memory), "there is no GPU"
    assert {row["phase"] for row in memory} <= plots.PHASES.keys()
    assert json.loads((run.folder / "scores.json").read_text())["after"]["loss"] == run.scores.after.loss
    assert json.loads((run.folder / "run.json").read_text())["status"] == "finished"
    assert str(run.folder) in str(run.files())
    names = ["adapter", "report.html", "recipe.json", "plan.json", "metrics.csv", "memory.csv"]
    names += ["scores.json", "checkpoints"]
    assert [name for name, _ in run.files().rows] == names
    assert all((run.folder / name).exists() for name in names)


@pytest.mark.parametrize("micro", [2, 4])
def test_tokens_are_counted_without_padding(recipe, rows, tmp_path, micro):
    rows.write_text("\n".join(json.dumps({"instruction": "Count.", "output": "one " * n}) for n in (1, 3, 7, 12)))
    r = recipe(method="lora", steps=2, eval_rows=0, micro_batch_size=micro)
    data = load_data(r)
    timeline = train(plan(r, CPU), data, name="run", runs=tmp_path).timeline
    every_row = sum(len(row.input_ids) for row in data.train)
    assert [step.tokens for step in timeline.steps] == [every_row, 2 * every_row]
    assert timeline.tokens_per_s > 0


def test_what_lasts_is_kept_with_the_run(recipe, tmp_path):
    run = train(plan(recipe(method="lora"), CPU), name="run", runs=tmp_path)
    assert run.buckets_gib["adapters"] == run.buckets_gib["gradients"] > 0
    assert run.buckets_gib["optimizer"] >= 2 * run.buckets_gib["adapters"]


def test_a_model_that_is_refused_leaves_no_folder(recipe, tmp_path):
    data = load_data(recipe())
    with pytest.raises(ModelError, match="does not exist"):
        train(plan(recipe(model="./not/here"), CPU), data, name="run", runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def _losses(recipe, tmp_path, **more):
    return train(plan(recipe(**more), CPU), name="run", runs=tmp_path).losses


def test_the_same_recipe_gives_the_same_losses(recipe, tmp_path):
    assert _losses(recipe, tmp_path, dropout=0.1) == _losses(recipe, tmp_path, dropout=0.1)


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_changes_memory_and_not_what_is_learned(recipe, tmp_path, micro):
    """The loss is divided by the trained tokens of the whole optimizer batch, not of each micro-batch."""
    whole = _losses(recipe, tmp_path, method="lora", micro_batch_size=4)
    parts = _losses(recipe, tmp_path, method="lora", micro_batch_size=micro)
    assert parts == pytest.approx(whole, abs=1e-4)


def test_what_fails_after_training_does_not_take_the_adapter_along(recipe, tmp_path, monkeypatch):
    import llamanb.evaluate as evaluation

    real, calls = evaluation.evaluate, []

    def fails_the_second_time(model, data):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(model, data)

    monkeypatch.setattr(evaluation, "evaluate", fails_the_second_time)
    with pytest.raises(MemoryError):
        train(plan(recipe(), CPU), name="run", runs=tmp_path)
    assert load_adapter(tmp_path / "run")


def test_no_row_held_out_means_no_scores(recipe, tmp_path):
    run = train(plan(recipe(eval_rows=0), CPU), name="run", runs=tmp_path)
    assert run.scores is None
    with pytest.raises(RecipeError, match="eval_rows"):
        run.compare()


def test_stop_after_min_ends_with_the_adapter_saved(recipe, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 10))  # ten seconds pass at every look
    monkeypatch.setattr("llamanb.training.trainer.time", SimpleNamespace(monotonic=lambda: next(clock)))
    run = train(plan(recipe(steps=50, stop_after_min=0.5), CPU), name="run", runs=tmp_path)
    assert 0 < len(run.losses) < 50
    assert list(run.saved.glob("*.safetensors"))


def test_a_small_model_takes_one_thread(recipe, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train(plan(recipe(steps=1), CPU), name="run", runs=tmp_path)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_stop_after_counts_from_before_loading():
    stop = StopAfter(minutes=1)
    assert stop._end_s == pytest.approx(time.monotonic() + 60, abs=5)


T4 = Card("T4", (7, 5), 14.56, attention=("memory-efficient", "math"), attention_gqa=("math",))


def _trainer(recipe, tmp_path, card, monkeypatch, **more):
    """The trainer as it would stand on a card, on a model that this machine can hold."""
    from llamanb.model import attach_adapters, load_model
    from llamanb.training import trainer

    r = recipe(**more)
    data = load_data(r)
    model = attach_adapters(load_model(plan(r, CPU), data.tokenizer), r)
    seen = {}

    class Config(trainer.SFTConfig):
        def __init__(self, **fields):
            seen.update(fields)
            # What a machine without a GPU refuses is recorded, and left out
            super().__init__(**{**fields, "fp16": False, "bf16": False, "use_cpu": True, "optim": "adamw_torch"})

    monkeypatch.setattr(trainer, "SFTConfig", Config)
    built = build_trainer(plan(r, card), model, data, tmp_path, [])
    return built, seen


def test_a_t4_trains_in_fp16_whatever_trl_would_choose(recipe, tmp_path, monkeypatch):
    trainer, config = _trainer(recipe, tmp_path, T4, monkeypatch)
    assert (config["fp16"], config["bf16"]) == (True, False)
    assert config["optim"] == "paged_adamw_8bit"
    assert not config["gradient_checkpointing"]
    assert not config["logging_nan_inf_filter"]
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_sft_trainer_narrows_adapters_and_we_widen_them(recipe, tmp_path, monkeypatch):
    """The crash of fp16 recipes: a quantized model's adapters in bf16. When trl stops doing it, this test says so."""
    monkeypatch.setattr("llamanb.training.trainer.widen_trained", lambda model: None)
    trainer, _ = _trainer(recipe, tmp_path, T4, monkeypatch)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    widen_trained(trainer.model)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_labels_reach_the_loss_as_they_were_made(recipe, tmp_path, monkeypatch):
    trainer, _ = _trainer(recipe, tmp_path, CPU, monkeypatch)
    data = load_data(recipe())
    numbers = sorted(range(len(data.train)), key=lambda i: len(data.train[i].input_ids))[::9]  # short and long
    step = trainer.data_collator([trainer.train_dataset[i] for i in numbers])
    rows = [data.train[i] for i in numbers]
    assert step["lengths"] == [len(row.input_ids) for row in rows]
    trained = [int((labels != -100).sum()) for labels in step["labels"].split(step["lengths"])]
    assert trained == [row.trained_tokens for row in rows]
    [batch] = trainer._micro_batches(step)
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["input_ids"][padding] == data.tokenizer.pad_token_id).all()
    assert (batch["labels"][padding] == -100).all()


def test_score_is_the_mean_over_trained_tokens(recipe):
    r = recipe(method="lora", eval_rows=4)
    data = load_data(r)
    from llamanb.model import load_model

    model = load_model(plan(r, CPU), data.tokenizer)
    total = count = 0.0
    for row in data.held_out:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].float()
        labels = torch.tensor(row.labels[1:])
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += row.trained_tokens
    assert evaluate(model, data).loss == pytest.approx(total / count, rel=1e-5)


def test_scoring_changes_neither_mode_nor_random_state(recipe):
    from llamanb.model import load_model

    r = recipe(method="lora")
    data = load_data(r)
    model = load_model(plan(r, CPU), data.tokenizer).train()
    before = torch.get_rng_state()
    evaluate(model, data)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_lesson_shows_no_library_chatter(recipe, tmp_path, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("always", FutureWarning)
        load_adapter(train(plan(recipe(), CPU), name="run", runs=tmp_path).folder)
    assert [str(w.message) for w in caught if w.category is not DeprecationWarning] == []
    assert capfd.readouterr().err == ""


def test_load_adapter_names_what_is_missing(tmp_path, recipe):
    with pytest.raises(ModelError, match="not the folder of a run"):
        load_adapter(tmp_path)
    recipe().save(tmp_path / "recipe.json")
    with pytest.raises(ModelError, match="no trained weights"):
        load_adapter(tmp_path)


def test_dora_and_rslora_train(recipe, tmp_path):
    run = train(plan(recipe(dora=True, rslora=True, steps=2), CPU), name="run", runs=tmp_path)
    names = load_file(run.saved / "adapter_model.safetensors").keys()
    assert any("magnitude" in name for name in names)


@pytest.mark.parametrize(("setting", "granted", "warned"), [("", False, False), ("x", True, False), ("x", False, True)])
def test_a_fragmenting_allocator_is_told(monkeypatch, setting, granted, warned):
    from llamanb.training.trainer import warn_of_gaps

    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True" if setting else "max_split_size_mb:128")
    snapshot = {"allocator_settings": {"expandable_segments": granted}}
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: snapshot)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_gaps()
    assert len(caught) == warned


def test_figures_are_passed_on_to_a_reporter(recipe, tmp_path, monkeypatch):
    """wandb, trackio and tensorboard are transformers' own callbacks; what they get is asked for here."""
    from transformers.integrations import integration_utils

    logged = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Reporter)
    (tmp_path / "trackio.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    run = train(plan(recipe(), CPU), runs=tmp_path, report_to="trackio")
    assert [log["loss"] for log in logged if "loss" in log] == run.losses


@pytest.mark.parametrize(("name", "why"), [("wandb2", "no such reporter"), ("trackio", "not installed")])
def test_a_reporter_that_is_not_there_is_refused_before_anything_is_loaded(recipe, tmp_path, monkeypatch, name, why):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(RecipeError, match=why):
        train(plan(recipe(), CPU), runs=tmp_path, report_to=name)
    assert not list(tmp_path.glob("run*"))


class _Interrupts(TrainerCallback):
    """Sends this process an interrupt at the beginning of a step, as a kernel's stop button does."""

    def __init__(self, *steps):
        self.steps = list(steps)

    def on_step_begin(self, args, state, control, **kwargs):
        while self.steps and self.steps[0] == state.global_step + 1:
            self.steps.pop(0)
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interrupted(monkeypatch):
    """`interrupted(2, 2)`: a trainer's callbacks, with interrupts in those steps."""
    from llamanb.training import trainer

    def at(*steps):
        build = trainer.build_trainer

        def built(plan, model, data, folder, callbacks, *rest):
            return build(plan, model, data, folder, [*callbacks, _Interrupts(*steps)], *rest)

        monkeypatch.setattr(trainer, "build_trainer", built)

    return at


def test_an_interrupt_ends_after_the_step_and_what_was_learned_is_there(recipe, tmp_path, interrupted, capsys):
    interrupted(2)
    before = signal.getsignal(signal.SIGINT)
    run = train(plan(recipe(steps=20), CPU), runs=tmp_path)
    assert len(run.losses) == 2
    assert run.status == "interrupted"
    assert run.scores is not None
    assert "interrupted: ending after this step" in capsys.readouterr().out
    model, _ = load_adapter(run.folder)
    assert any(p.any() for n, p in model.named_parameters() if "lora_B" in n)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_ends_at_once_and_leaves_a_run_that_can_be_shown(recipe, tmp_path, interrupted):
    interrupted(3, 3)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(plan(recipe(steps=20), CPU), runs=tmp_path)
    run = show_run(tmp_path / "run")
    assert len(run.losses) == 2
    assert run.status == "ended by KeyboardInterrupt"
    assert signal.getsignal(signal.SIGINT) is before


def test_training_in_another_thread_minds_no_signals(recipe, tmp_path):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train(plan(recipe(), CPU), runs=tmp_path)))
    thread.start()
    thread.join()
    assert runs[0].status == "finished"


def test_a_run_s_plan_says_why_its_steps_take_longer(recipe, tmp_path, monkeypatch):
    from llamanb.model import fused

    monkeypatch.setattr(fused, "fits_layer", lambda layer: "a layer of another kind")
    monkeypatch.setattr("llamanb.training.step.fits_layer", fused.fits_layer)
    with pytest.warns(UserWarning, match="a layer of another kind"):
        run = train(plan(recipe(eval_rows=0), CPU).replace(fused=True), name="run", runs=tmp_path)
    assert run.plan.reasons["fused"] == "not fused: a layer of another kind"
    assert show_run(run.folder).plan.reasons == run.plan.reasons


@pytest.mark.parametrize(("places", "watched"), [(("WSL2",), True), (("Colab",), False)])
def test_where_a_full_gpu_spills_its_slowness_is_watched(mini, tmp_path, monkeypatch, places, watched):
    from llamanb.training import recovery, trainer

    seen, build = [], trainer.build_trainer

    def built(plan, model, data, folder, callbacks, *rest):
        seen.extend(callbacks)
        return build(plan, model, data, folder, callbacks, *rest)

    monkeypatch.setattr(trainer, "build_trainer", built)
    monkeypatch.setattr("llamanb.training.surroundings", lambda: places)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": "Say it.", "output": f"It is {n}."}) for n in range(4)))
    recipe = Recipe(model=str(mini), dataset=str(rows), max_length=64, steps=1, eval_rows=0, effective_batch_size=2)
    train(plan(recipe, Card("CPU", None)), runs=tmp_path / "runs")
    assert any(isinstance(one, recovery.Spills) for one in seen) is watched
