"""bitsandbytes' AdamW over joined tensors: the same numbers as one by one, bit for bit."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.optim import AdamW

from llamanb.tape import joined
from llamanb.training.optimizer import JoinedAdamW, page_again
from llamanb.training.recovery import go_on

LAYER = [(64, 256), (512, 64), (16, 1024), (16, 64), (9, 1000), (32, 256)]
"""Of a layer: two tensors small for 8-bit states or with no whole blocks are among them."""
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def parameters(layers=2):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for _ in range(layers) for shape in LAYER]


def trained(made, optimizer, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        for parameter in made:
            parameter.grad = torch.randn_like(parameter)
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step()
    return made


def joined_adamw(made, **settings):
    with warnings.catch_warnings(action="ignore"):  # a CPU does not page
        return JoinedAdamW(made, of_layer=len(LAYER), **SETTINGS, **{"optim_bits": 8, **settings})


@pytest.mark.parametrize("settings", [{"optim_bits": 8}, {"optim_bits": 8, "is_paged": True}, {"optim_bits": 32}])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_joined_tensors_are_updated_as_each_by_itself(settings):
    alone, together = parameters(), parameters()
    trained(alone, AdamW(alone, **SETTINGS, **settings), 5)
    optimizer = joined_adamw(together, **settings)
    trained(together, optimizer, 5)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert len(optimizer.state) == 8 < len(together), "four of each layer's six"
    assert not torch.equal(together[0], parameters()[0])


def test_one_update_is_for_many_tensors(monkeypatch):
    made, sizes = parameters(), []
    optimizer = joined_adamw(made)
    update = optimizer.update_step
    monkeypatch.setattr(
        optimizer, "update_step", lambda group, p, *at: sizes.append(p.numel()) or update(group, p, *at)
    )
    trained(made, optimizer, 1)
    assert sizes == 2 * [64 * 256 + 512 * 64 + 16 * 1024, 16 * 64, 9 * 1000, 32 * 256]


def test_what_is_joined_are_neighbours_of_a_layer_with_whole_blocks_and_not_too_many():
    million = 2**20
    assert joined([4096] * 5, 3) == [range(3), range(3, 5)]
    assert joined([4096, 4096, 4095, 4096, 4096], 9) == [range(2), range(2, 3), range(3, 5)]
    assert joined([4096, 2048, 4096, 4097], 9) == [range(1), range(1, 2), range(2, 3), range(3, 4)]
    assert joined([3 * million, million, 256 * 16, 5 * million, million], 9) == [
        range(2),
        range(2, 3),
        range(3, 4),
        range(4, 5),
    ]
    assert joined([4096, 4096], 1) == [range(1), range(1, 2)]
    assert joined([], 4) == []


@pytest.mark.parametrize("theirs", [False, True])
def test_it_goes_on_from_saved_states_also_from_bitsandbytes_own(theirs):
    right, made = parameters(), parameters()
    trained(right, AdamW(right, **SETTINGS, optim_bits=8), 6)
    before = AdamW(made, **SETTINGS, optim_bits=8) if theirs else joined_adamw(made)
    trained(made, before, 3)
    saved = copy.deepcopy(before.state_dict())
    optimizer = joined_adamw(made)
    optimizer.load_state_dict(saved)
    trained(made, optimizer, 3, first=3)
    assert all(torch.equal(one, other) for one, other in zip(right, made, strict=True))


def test_states_of_other_parameters_are_refused():
    """A kernel would write beyond their end."""
    made = parameters()
    before = joined_adamw(made)
    trained(made, before, 1)
    others = [torch.nn.Parameter(torch.randn(64, 512)), *parameters()[1:]]
    with pytest.raises(ValueError, match="65536 elements, for 81920 that are trained"):
        joined_adamw(others).load_state_dict(before.state_dict())


@pytest.mark.parametrize("make", [joined_adamw, lambda made, **more: AdamW(made, **SETTINGS, optim_bits=8, **more)])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_loaded_states_are_paged_again(monkeypatch, make):
    """bitsandbytes loads them as plain tensors; only a GPU pages, so its buffers are watched here."""
    made, buffers = parameters(1), []
    before = make(made, is_paged=True)
    trained(made, before, 1)
    optimizer = make(made, is_paged=True)
    optimizer.load_state_dict(before.state_dict())
    take = optimizer.get_state_buffer
    monkeypatch.setattr(optimizer, "get_state_buffer", lambda *of: buffers.append(take(*of)) or buffers[-1])
    page_again(SimpleNamespace(optimizer=optimizer))
    states = [state[name] for state in optimizer.state.values() for name in ("state1", "state2")]
    assert {id(state) for state in states} == {id(buffer) for buffer in buffers}
    for parameter, state in optimizer.state.items():
        for name, value in before.state[parameter].items():
            assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(value)), name


def test_what_is_not_paged_stays_as_it_is():
    made = parameters(1)
    optimizer = joined_adamw(made)
    trained(made, optimizer, 1)
    was = [id(state["state1"]) for state in optimizer.state.values()]
    page_again(optimizer)
    assert [id(state["state1"]) for state in optimizer.state.values()] == was


def test_only_what_has_gradients_is_updated():
    made = parameters()
    optimizer = joined_adamw(made)
    trained(made, optimizer, 1)
    was = [parameter.detach().clone() for parameter in made]
    for parameter in made[: len(LAYER)]:
        parameter.grad = None
    optimizer.step()
    changed = [not torch.equal(one, other) for one, other in zip(was, made, strict=True)]
    assert changed == [False] * len(LAYER) + [True] * len(LAYER)


@pytest.mark.parametrize(("step", "at"), [*((0, at) for at in range(20)), *((1, at) for at in range(4))])
def test_it_goes_on_where_it_came_to_when_memory_runs_out(monkeypatch, at, step):
    """In its copies, or in a state that is made: what is updated is not updated twice."""

    def trained_with(fails_at):
        made, asked = parameters(), []
        optimizer = joined_adamw(made)
        go_on(optimizer)
        trained(made, optimizer, step)
        with monkeypatch.context() as patch:
            for name, real in (("cat", torch.cat), ("zeros_like", torch.zeros_like)):

                def counted(*args, take=real, **settings):
                    asked.append(at)
                    if len(asked) - 1 == fails_at:
                        raise torch.OutOfMemoryError("CUDA out of memory")
                    return take(*args, **settings)

                patch.setattr(torch, name, counted)
            trained(made, optimizer, 1, first=step)
        return trained(made, optimizer, 1, first=step + 1), len(asked)

    right, undisturbed = trained_with(None)
    assert undisturbed == (4 if step else 20)
    got, asked = trained_with(at)
    assert asked > undisturbed
    assert all(torch.equal(one, other) for one, other in zip(right, got, strict=True))
