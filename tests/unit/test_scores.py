"""What scores say: whether training helped, judged row by row, and right answers as SQuAD counts them."""

import json
import math
import random

import pytest

from llamanb.evaluate import squad_scores
from llamanb.scores import BETTER, MIXED, UNCLEAR, WORSE, Comparison, RowScore, Scores


def scores(nats, exact=None, ended=None, f1=None, tokens=10):
    n = len(nats)
    columns = [column or [None] * n for column in (exact, f1, ended)]
    rows = zip(nats, *columns, strict=True)
    return Scores(tuple(RowScore(x, tokens, "", end, right, part) for x, right, part, end in rows))


def verdict(before, after):
    texts = ("",) * len(before.rows)
    return Comparison(before, after, texts, texts).verdict


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [  # worked by hand after SQuAD's rules: lower case, no punctuation, no a / an / the, words counted
        ("Denver Broncos", ("Denver Broncos",), True, 1.0),
        ("The denver  broncos!", ("Denver Broncos",), True, 1.0),
        ("in 1889", ("1889", "the year 1889"), False, 2 / 3),  # precision 1/2, recall 1
        ("year 1889", ("1889", "the year 1889"), True, 1.0),  # the best of the references
        ("the cat sat on the mat", ("a cat on a mat",), False, 6 / 7),  # 3 shared of 4 and 3 words
        ("to be or not to be", ("to be",), False, 2 * (2 / 6) * 1 / (2 / 6 + 1)),
        ("green", ("red",), False, 0.0),
        ("", ("red",), False, 0.0),
        ("unanswerable", ("unanswerable",), True, 1.0),
        ("Unanswerable.", ("unanswerable",), True, 1.0),
        ('"unanswerable"', ("unanswerable",), True, 1.0),
        ("", ("unanswerable",), True, 1.0),  # the empty answer is SQuAD's own word for it
        ("unanswerable", ("red",), False, 0.0),
        ("red", ("unanswerable",), False, 0.0),
        ("it is unanswerable here", ("unanswerable",), False, 0.0),  # no half points for a word of it
    ],
)
def test_squad_by_hand(answer, references, exact, f1):
    assert squad_scores(answer, references) == (exact, pytest.approx(f1, abs=1e-6))


def test_means():
    both = Scores((RowScore(3.0, 1, "a", True, True, 1.0), RowScore(1.0, 3, "b", False, False, 0.5)))
    assert (both.loss, both.perplexity) == (1.0, math.e)
    assert (both.exact_match, both.f1, both.ended, both.answers) == (0.5, 0.75, 0.5, ("a", "b"))
    plain = scores([2.0, 2.0])
    assert (plain.exact_match, plain.f1, plain.ended) == (None, None, None)


def test_a_loss_that_falls_on_every_row_is_better_and_one_that_rises_is_worse():
    before, after = scores([20.0] * 8), scores([10.0] * 8)
    assert verdict(before, after).word == BETTER
    worse = verdict(after, before)
    assert worse.word == WORSE
    assert worse.why == "loss per token 1.000 → 2.000, on 8 rows that training never saw. Worse: loss"
    assert "learning rate" in worse.fix
    assert str(worse).startswith("worse: loss per token 1.000")
    assert "role='alert'" in worse._repr_html_()


def test_a_few_rows_say_nothing():
    assert verdict(scores([20.0] * 5), scores([10.0] * 5)).word == UNCLEAR
    assert verdict(scores([20.0] * 6), scores([10.0] * 6)).word == BETTER
    assert "eval_rows" in str(verdict(scores([2.0]), scores([1.0])))


def test_noise_is_not_taken_for_a_difference():
    """Differences of either sign, drawn 500 times: named better or worse as rarely as CHANCE says, and a true
    difference of half their spread is named nearly always."""
    rng, found = random.Random(0), []
    for shift in (0.0, -0.5):
        words = []
        for _ in range(500):
            before = [rng.gauss(20, 5) for _ in range(64)]
            words.append(verdict(scores(before), scores([x + rng.gauss(shift, 1) for x in before])).word)
        found.append([words.count(word) / 500 for word in (BETTER, WORSE, UNCLEAR)])
    (wrongly_better, wrongly_worse, _), (better, worse, _) = found
    assert wrongly_better + wrongly_worse < 0.05
    assert (better > 0.9, worse) == (True, 0.0)


def test_one_bad_row_is_no_verdict_on_all():
    before = [10.0] * 20
    assert verdict(scores(before), scores([100.0, *before[1:]])).word == UNCLEAR


def test_answers_count_beside_the_loss():
    right, wrong = [True] * 12, [False] * 12
    assert verdict(scores([20.0] * 12, wrong), scores([10.0] * 12, right)).word == BETTER
    mixed = verdict(scores([20.0] * 12, right), scores([10.0] * 12, wrong))
    assert mixed.word == MIXED
    assert "Worse: right answers" in mixed.why
    assert "exact match 100% → 0%" in mixed.why
    halves = verdict(scores([20.0] * 12, right, f1=[0.9] * 12), scores([20.0] * 12, right, f1=[0.4] * 12))
    assert (halves.word, "F1 90% → 40%" in halves.why) == (WORSE, True)


def test_answers_that_no_longer_end_are_worse():
    found = verdict(scores([20.0] * 12, ended=[True] * 12), scores([20.0] * 12, ended=[False] * 12))
    assert found.word == WORSE
    assert "Worse: answers that end by themselves" in found.why


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_model_that_gives_no_number_is_worse(broken):
    assert verdict(scores([20.0] * 8), scores([10.0] * 7 + [broken])).word == WORSE
    assert verdict(scores([20.0] * 7 + [broken]), scores([10.0] * 8)).word == BETTER


def test_read_as_written():
    row = RowScore(1.5, 3, 'a "b"', True, False, 0.25)
    made = Comparison(Scores((row, RowScore(1.0, 1))), Scores((row, row)), ("q", "r"), ("x", "y"), shown=1)
    assert Comparison.from_json(made.to_json()) == made
    assert json.loads(made.to_json())["before"]["loss"] == made.before.loss


def test_tables_leave_out_what_was_not_scored():
    texts = ("q",) * 3
    names = [row[0] for row in Comparison(scores([1.0] * 3), scores([1.0] * 3), texts, texts).tables()[0].rows]
    assert names == ["loss per token", "perplexity"]
