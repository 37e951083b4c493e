"""Memory that runs out: nothing of the failed try lives on, what comes next takes less, and what is learned stays."""

import contextlib
import gc
import io
import itertools
import random
import weakref
from types import SimpleNamespace

import pytest
import torch

from llamanb import Card, Recipe, plan
from llamanb.attempts import attempt, in_halves, is_out_of_memory
from llamanb.data.packing import pack
from llamanb.evaluate import evaluate
from llamanb.layout import GIB
from llamanb.tape import CHECKPOINTED, OFFLOADED
from llamanb.timeline import Step, Timeline
from llamanb.training.recovery import Spills, go_on, smaller
from llamanb.training.resume import RAN_OUT, as_it_ran
from llamanb.training.step import heaviest

EIGHT = "meta-llama/Llama-3.1-8B-Instruct"


def ran_out(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


# attempt


def test_nothing_of_a_failed_try_is_alive_when_the_other_way_begins():
    held = []

    def inner(tensor):
        held.append(weakref.ref(tensor))
        other = torch.ones(5) + tensor
        held.append(weakref.ref(other))
        try:
            ran_out()
        except RuntimeError as error:
            raise RuntimeError("CUDA error: out of memory") from error

    def way():
        return [one() is None for one in held]

    assert attempt(lambda: inner(torch.ones(5)), lambda error: way) == [True, True]


def test_the_other_way_is_chosen_while_everything_lives():
    tensor = torch.ones(3)
    held = weakref.ref(tensor)

    def otherwise(error):
        assert held() is not None
        return lambda: str(type(error).__name__)

    assert attempt(ran_out, otherwise) == "OutOfMemoryError"


@pytest.mark.parametrize("error", [ValueError("out of range"), KeyboardInterrupt(), RuntimeError("illegal access")])
def test_other_errors_pass(error):
    def fails():
        raise error

    with pytest.raises(type(error)) as caught:
        attempt(fails, lambda error: pytest.fail("asked for another way"))
    assert caught.value is error


def test_without_another_way_the_error_passes_as_it_is():
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        attempt(ran_out, lambda error: None)


@pytest.mark.parametrize("most", range(1, 8))
def test_work_goes_on_in_halves(most):
    sizes = []

    def work(items):
        if len(items) > most:
            ran_out()
        sizes.append(len(items))
        return list(items)

    items = list(range(7))
    assert list(itertools.chain(*in_halves(work, items))) == items
    assert max(sizes) <= most
    with pytest.raises(torch.OutOfMemoryError):
        in_halves(ran_out, items)


# smaller plans


@pytest.mark.parametrize("card", ["T4", "RTX 4090", "RTX 3060"])
@pytest.mark.parametrize("length", [512, 2048, 6144])
def test_each_plan_takes_less_than_the_one_before_until_none_does(card, length):
    made = plan(Recipe(model=EIGHT, max_length=length), card, force=True)
    chain = [made]
    while (less := smaller(chain[-1])) is not None:
        chain.append(less)
        assert len(chain) < 40
    assert len(chain) > 1
    for one, less in itertools.pairwise(chain):
        assert less.needs_gib < one.needs_gib
        assert less.needs_gib < 0.96 * one.needs_gib or less is chain[-1]
        assert less.micro_batch_size * less.accumulation == made.recipe.effective_batch_size
        fields = ("recipe", "dtype", "attention", "kernel", "optimizer", "fused", "length", "card")
        assert all(getattr(less, name) == getattr(made, name) for name in fields)
    assert chain[-1].micro_batch_size == 1
    assert set(chain[-1].layers) == {OFFLOADED}


def test_after_a_plan_that_was_forced_onto_a_card_comes_one_that_fits_it():
    made = plan(Recipe(model=EIGHT, micro_batch_size=16, checkpointing="none"), "RTX 3060", force=True)
    assert made.needs_gib > made.card.vram_gib
    assert smaller(made).needs_gib <= made.card.free_gib


def test_a_layout_that_was_asked_for_gives_way_too():
    made = plan(Recipe(model=EIGHT, micro_batch_size=4, checkpointing="none"), "RTX 4090", force=True)
    less = smaller(made)
    assert less.needs_gib < made.needs_gib
    assert (less.recipe.micro_batch_size, less.recipe.checkpointing) == (4, "none"), "the recipe stays as it was asked"


def test_on_a_cpu_rows_are_halved_and_then_layers_recomputed(mini):
    made = plan(Recipe(model=str(mini), effective_batch_size=12, micro_batch_size=6), Card("CPU", None))
    seen = []
    while made is not None:
        seen.append((made.micro_batch_size, made.accumulation, made.recomputed))
        made = smaller(made)
    assert seen == [(6, 2, 0), (3, 4, 0), (1, 12, 0), (1, 12, 2)]


def test_the_heaviest_rows_are_those_of_two_micro_batches():
    rows = rows_of(3, 9, 2, 7, 5)
    of = {count: SimpleNamespace(micro_batch_size=count, share=4 * count) for count in (1, 2, 4)}
    assert [heaviest(rows, of[count], fused=False)["lengths"] for count in of] == [
        [7, 9],
        [3, 5, 7, 9],
        [2, 3, 5, 7, 9],
    ]
    assert heaviest(rows, SimpleNamespace(micro_batch_size=2, share=2), fused=False)["lengths"] == [7, 9]


def rows_of(*lengths):
    return [SimpleNamespace(input_ids=[1] * n, labels=[1] * n) for n in lengths]


@pytest.mark.parametrize(
    ("lengths", "micro", "longest", "share", "heaviest_rows"),
    [
        ([90, 20, 20, 20, 20, 20, 20], 1, 100, 16, [20, 20, 20, 20, 20, 20]),  # five are 100 tokens
        ([90, 20, 20, 20, 20, 20, 20], 1, 100, 4, [20, 20, 20, 90]),  # four are 80
        ([90, 20, 20, 20], 1, 100, 1, [90]),
        ([90], 2, 100, 16, [90]),
        ([90, 80, 10], 2, 100, 3, [10, 80, 90]),
        ([130, 20, 20], 1, 100, 3, [20, 20, 130]),  # longer than planned for, and alone
    ],
)
def test_end_to_end_many_shorter_rows_may_be_heavier_than_the_longest(lengths, micro, longest, share, heaviest_rows):
    made = SimpleNamespace(micro_batch_size=micro, length=longest, share=share)
    assert heaviest(rows_of(*lengths), made, fused=True)["lengths"] == heaviest_rows


@pytest.mark.parametrize("seed", range(5))
def test_no_micro_batch_of_any_step_has_more_tokens(seed):
    source = random.Random(seed)
    lengths = [min(680, max(20, round(source.gauss(250, 120)))) for _ in range(400)]
    made = SimpleNamespace(micro_batch_size=2, length=1024, share=16)

    def most(rows):
        return max(sum(rows[i] for i in batch) for batch in pack(rows, 2 * 1024))

    probed = most(heaviest(rows_of(*lengths), made, fused=True)["lengths"])
    assert all(most(source.sample(lengths, 16)) <= probed for _ in range(200))


# a plan that is kept


def kept_run(tmp_path, recipe, card, **changes):
    made = plan(recipe, card)
    less = smaller(made).replace(reasons={**made.reasons, "layers": f"{RAN_OUT} at step 3"}).replace(**changes)
    (tmp_path / "plan.json").write_text(less.to_json())
    return made, less


def test_a_run_goes_on_with_the_plan_that_it_came_to(tmp_path):
    made, less = kept_run(tmp_path, Recipe(model=EIGHT), "T4")
    again = as_it_ran(made, tmp_path)
    assert (again.layers, again.micro_batch_size, again.memory) == (less.layers, less.micro_batch_size, less.memory)
    assert again.card == made.card


@pytest.mark.parametrize("other", ["card", "micro_batch_size", "never ran out"])
def test_another_card_or_wish_counts_more(tmp_path, other):
    recipe = Recipe(model=EIGHT)
    made, less = kept_run(tmp_path, recipe, "T4", **({"reasons": {}} if other == "never ran out" else {}))
    if other == "card":
        made = plan(recipe, "RTX 4090")
    if other == "micro_batch_size":
        made = plan(recipe.replace(micro_batch_size=1), "T4")
    assert as_it_ran(made, tmp_path) == made != less


@pytest.mark.parametrize("text", ["", "{", "[]", '{"reasons": 3}', None])
def test_what_cannot_be_read_changes_no_plan(tmp_path, text):
    made, less = kept_run(tmp_path, Recipe(model=EIGHT), "T4")
    odd = less.to_json().replace('"reasons": {', '"reasons": 3, "of_old": {') if text is None else text
    (tmp_path / "plan.json").write_text(odd)
    assert as_it_ran(made, tmp_path) == made


# the optimizer


def optimizers():
    from bitsandbytes.optim import AdamW8bit

    return {
        "torch": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
        "bitsandbytes": lambda parameters: AdamW8bit(parameters, lr=0.1, min_8bit_size=16),
    }


@pytest.mark.parametrize("name", ["torch", "bitsandbytes"])
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("step", [0, 1])
def test_an_optimizer_goes_on_where_it_came_to(monkeypatch, name, at, step):
    """An allocation of its states fails; after the first step there are none to make."""

    def trained(fails_at):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(8, 64)) for _ in range(3)]
        optimizer = optimizers()[name](parameters)
        go_on(optimizer)
        made = []
        for number in range(3):
            for i, p in enumerate(parameters):
                p.grad = torch.full_like(p, 0.1 * (number + i + 1))
            with monkeypatch.context() as patch:
                zeros = torch.zeros_like

                def counted(*args, zeros=zeros, number=number, **kwargs):
                    made.append(number)
                    if len(made) - 1 == fails_at:
                        ran_out()
                    return zeros(*args, **kwargs)

                patch.setattr(torch, "zeros_like", counted)
                optimizer.step()
        return [p.detach() for p in parameters], made

    right, undisturbed = trained(None)
    got, made = trained(at)
    assert len(undisturbed) == 6
    assert set(undisturbed) == {0}
    assert len(made) > 6, "it failed, and what was half made was made again"
    assert all(torch.equal(one, other) for one, other in zip(got, right, strict=True))


def test_an_optimizer_that_never_finds_its_memory_says_so():
    optimizer = torch.optim.AdamW([parameter := torch.nn.Parameter(torch.ones(3))])
    parameter.grad = torch.ones(3)
    optimizer.step = ran_out
    go_on(optimizer)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()


# scoring


def test_scores_are_the_same_in_halves(mini, tmp_path, monkeypatch):
    from llamanb import load_data
    from llamanb.data.encode import load_tokenizer
    from llamanb.model import load_model

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(f'{{"instruction": "Say {n}.", "output": "It is {n}."}}' for n in range(60)))
    recipe = Recipe(model=str(mini), dataset=str(rows), eval_rows=6, max_length=128)
    data, model = load_data(recipe), load_model(plan(recipe, Card("CPU", None)), load_tokenizer(mini))
    right, most = evaluate(model, data), []
    forward = type(model.model).forward

    def narrow(self, input_ids=None, **kwargs):
        most.append(len(input_ids))
        return ran_out() if len(input_ids) > 2 else forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", narrow)
    got = evaluate(model, data)
    gc.collect()
    assert max(most) == 6
    assert got.loss == pytest.approx(right.loss, abs=1e-6)
    assert (got.exact_match, got.answers) == (right.exact_match, right.answers)


def test_the_hosts_memory_counts_too():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))


def test_smaller_plans_are_of_the_layers_that_run():
    """All recomputed already, and one row: inputs go to the host."""
    made = plan(Recipe(model=EIGHT, checkpointing="all", micro_batch_size=1, max_length=8192), "T4")
    assert set(made.layers) == {CHECKPOINTED}
    less = smaller(made)
    assert set(less.layers) == {OFFLOADED}
    assert less.needs_gib * GIB < made.needs_gib * GIB


# memory that spills


def spilled(rates):
    """What is said of steps of 100 tokens at these tokens a second."""
    timeline, said = Timeline("test"), []
    spills, now = Spills(timeline), 0.0
    for i, rate in enumerate(rates):
        now += 100 / rate
        timeline.steps.append(Step(i + 1, now, 1.0, 0.1, 1.0, 100 * (i + 1)))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            spills.on_log(None, None, None)
        said += [i + 1] if out.getvalue() else []
    return said


def test_steps_that_became_much_slower_are_told_once():
    assert spilled([50, 200, 210, 190, 205, 200, 20, 21, 20, 22]) == [8], "two in a row: one may have saved"


@pytest.mark.parametrize(
    "rates", [[200] * 20, [200, 190, 20, 200, 210, 20, 205], [20, 200, 200], [200, 100, 90, 80, 70]]
)
def test_usual_steps_are_not(rates):
    assert spilled(rates) == []
