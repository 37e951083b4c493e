"""Attention of rows that lie one behind the other, held to a softmax written out for each row."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from llamanb.model import row_attention
from llamanb.model.attention import expanded_attention
from llamanb.model.row_attention import for_rows
from tests.conftest import ROOT

CPU = torch.device("cpu")
LENGTHS = [(1,), (6,), (5, 5), (4, 4, 4), (1, 1), (7, 3), (1, 8, 1, 2), (3, 3, 4)]
HEADS = [(4, 4), (4, 2), (6, 2), (3, 1)]


def given(tokens, heads, key_heads, size=8, dtype=torch.float64):
    torch.manual_seed(tokens)
    return [torch.randn(tokens, n, size, dtype=dtype, requires_grad=True) for n in (heads, key_heads, key_heads)]


def written_out(q, k, v, lengths):
    """Each row's scores, masked and softmaxed; (tokens, heads, head size)."""
    groups = q.shape[1] // k.shape[1]
    found = []
    for q1, k1, v1 in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        k1, v1 = (t.repeat_interleave(groups, dim=1) for t in (k1, v1))
        scores = torch.einsum("ihd,jhd->hij", q1, k1) / math.sqrt(q.shape[-1])
        later = torch.ones(len(q1), len(q1), dtype=torch.bool).triu(1)
        found.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(later, -math.inf).softmax(-1), v1))
    return torch.cat(found)


@pytest.mark.parametrize(("heads", "key_heads"), HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_value_and_gradients_are_those_of_a_softmax_for_each_row(lengths, heads, key_heads):
    inputs = given(sum(lengths), heads, key_heads)
    out = for_rows(lengths, "", CPU)(*inputs)
    right = written_out(*inputs, list(lengths))
    assert out.shape == inputs[0].shape
    torch.testing.assert_close(out, right)
    gradient = torch.randn_like(out)
    got, expected = (torch.autograd.grad(of, inputs, gradient) for of in (out, right))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("lengths", [(5, 5), (2, 6)])
def test_gradients_against_differences(lengths):
    assert torch.autograd.gradcheck(for_rows(lengths, "", CPU), given(sum(lengths), 2, 1, size=4), fast_mode=True)


@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 3, 4)])
def test_a_row_s_gradient_comes_from_that_row_alone(lengths):
    inputs = given(12, 4, 2)
    out = for_rows(lengths, "", CPU)(*inputs)
    for at, row in enumerate(out.split(lengths)):
        for gradient in torch.autograd.grad(row.sum(), inputs, retain_graph=True):
            reached = [part.any().item() for part in gradient.split(lengths)]
            assert reached == [i == at for i in range(3)]


def test_16_bits_are_near_64():
    inputs = given(9, 4, 2)
    right = written_out(*inputs, [5, 4])
    for dtype in (torch.float32, torch.bfloat16):
        out = for_rows((5, 4), "", CPU)(*(t.detach().to(dtype) for t in inputs))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), right.detach(), rtol=0, atol=0.03)


MULTIPROCESSORS = 20


@pytest.fixture
def kernels(monkeypatch):
    """torch's kernels for a GPU, played by the softmax written out; what they were called with."""
    called = []

    def rows_of(q, borders):
        """(lengths of all rows, the tensors' tokens one behind the other)."""
        if borders is None:
            return [q.shape[1]] * q.shape[0]
        assert borders.dtype == torch.int32
        return [int(b - a) for a, b in itertools.pairwise(borders)]

    def efficient(q, k, v, bias, borders, key_borders, longest, key_longest, dropout, mask, keep, **kwargs):
        assert k.shape == v.shape == q.shape, "the kernel takes no grouped heads"
        assert (bias, dropout, mask, keep) == (None, 0.0, row_attention.CAUSAL, True)
        assert borders is key_borders
        assert longest == key_longest == (max(rows_of(q, borders)) if borders is not None else None)
        called.append("memory-efficient")
        out = written_out(*(t.flatten(0, 1) for t in (q, k, v)), rows_of(q, borders)).view_as(q)
        return out, torch.zeros(1), torch.tensor(0), torch.tensor(0), 0, 0

    def efficient_backward(gradient, q, k, v, bias, out, borders, key_borders, longest, key_longest, *rest, **kwargs):
        assert longest == key_longest == max(rows_of(q, borders))
        assert kwargs == {"num_splits_key": row_attention.splits(q, longest)}
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (q, k, v)]
            again = written_out(*(t.flatten(0, 1) for t in inputs), rows_of(q, borders)).view_as(q)
            return *torch.autograd.grad(again, inputs, gradient), None

    def flash(q, k, v, borders, key_borders, longest, key_longest, dropout, causal, debug):
        assert borders is key_borders
        assert longest == key_longest == max(rows_of(q, borders))
        assert (dropout, causal, debug) == (0.0, True, False)
        called.append("flash")
        return written_out(q, k, v, rows_of(q, borders)), None, None, None, None

    aten = torch.ops.aten
    on_a_gpu(monkeypatch, MULTIPROCESSORS)
    monkeypatch.setattr(aten, "_efficient_attention_forward", efficient)
    monkeypatch.setattr(aten, "_efficient_attention_backward", efficient_backward)
    monkeypatch.setattr(aten, "_flash_attention_forward", flash)
    return called


def on_a_gpu(monkeypatch, multiprocessors, major=9):
    properties = SimpleNamespace(multi_processor_count=multiprocessors, major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


MEASURED = [
    json.loads(line) for line in (ROOT / "benchmarks/results/raw/attention_splits.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("line", MEASURED, ids=lambda line: f"{line['rows']}x{line['length']}-{line['heads']}")
def test_keys_are_split_into_nearly_the_best_number_of_parts_that_was_measured(monkeypatch, line):
    on_a_gpu(monkeypatch, 132)
    query = torch.empty(line["rows"], line["length"], line["heads"], line["head_size"], device="meta")
    taken = row_attention.splits(query, line["length"])
    ms = {int(parts): ms for parts, ms in line["backward_ms"].items()}
    assert ms[min(ms, key=lambda parts: abs(math.log(parts / taken)))] < 1.11 * min(ms.values())


def test_parts_follow_from_rows_that_are_full(monkeypatch):
    """Four rows of 1,024 tokens, one behind the other or not; one of 4,096; one of 2,048 among short ones."""
    on_a_gpu(monkeypatch, 20)
    lying = torch.empty(1, 4096, 10, 128, device="meta")
    assert row_attention.splits(lying, 1024) == row_attention.splits(lying.view(4, 1024, 10, 128), 1024) == 1
    assert row_attention.splits(lying, 4096) == row_attention.splits(lying[:, :2100], 2048) == 2


def test_one_part_where_sums_are_to_be_the_same_each_time_and_where_parts_may_take_memory(monkeypatch):
    query = torch.empty(1, 8192, 32, 128, device="meta")
    on_a_gpu(monkeypatch, 132)
    assert row_attention.splits(query, 8192) == 4
    torch.use_deterministic_algorithms(True)
    try:
        assert row_attention.splits(query, 8192) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    on_a_gpu(monkeypatch, 40, major=7)
    assert row_attention.splits(query, 8192) == 1
    assert row_attention.splits(query[..., :64], 8192) > 1


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kernel", ["memory-efficient", "flash"])
def test_gpu_kernels_are_called_for_the_same(kernels, kernel, lengths):
    """FlashAttention takes rows of one length through scaled_dot_product_attention, as a batch."""
    inputs = given(sum(lengths), 6, 2)
    out = for_rows(lengths, kernel, CPU)(*inputs)
    assert kernels == ([] if kernel == "flash" and len(set(lengths)) == 1 else [kernel])
    right = written_out(*inputs, list(lengths))
    torch.testing.assert_close(out, right)
    gradient = torch.randn_like(out)
    got, expected = (torch.autograd.grad(of, inputs, gradient) for of in (out, right))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_keys_and_values_are_kept_with_their_own_heads(kernels):
    """Repeated, they would be three times as many here."""
    inputs, kept = given(9, 6, 2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for_rows((5, 4), "memory-efficient", CPU)(*inputs)
    assert [tuple(t.shape) for t in kept[:4]] == [(9, 6, 8), (9, 2, 8), (9, 2, 8), (9, 6, 8)]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_expanded_attention_is_attention_with_repeated_heads(groups):
    q, k, v = (torch.randn(2, n, 5, 8, dtype=torch.float64) for n in (4, 4 // groups, 4 // groups))
    out, _ = expanded_attention(None, q, k, v, None)
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    torch.testing.assert_close(out.flatten(0, 1), written_out(*rows, [5, 5]))
    last, _ = expanded_attention(None, q[:, :, -1:], k, v, None)
    torch.testing.assert_close(last[:, 0], out[:, -1], msg="one query sees all that was before")
