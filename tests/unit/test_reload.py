"""What was made of an adapter, loaded again and asked the same."""

import pytest

from llamanb import load_adapter, load_merged, merge, same_answers, tiny, to_gguf
from llamanb.errors import ModelError, RecipeError
from llamanb.export import reload

QUESTIONS = [row["messages"][0]["content"] for row in tiny.rows("eval", count=8)]


@pytest.fixture(scope="module")
def merged(tuned_run, tmp_path_factory):
    return merge(tuned_run, tmp_path_factory.mktemp("made") / "merged")


def test_each_says_what_base_and_adapter_said_and_ends_by_itself(tuned_run, merged):
    files = [to_gguf(merged, kind=kind) for kind in ("f16", "q8_0")]
    model, tokenizer = load_adapter(tuned_run.folder)
    table = same_answers(model, tokenizer, QUESTIONS, [merged, *files])
    assert [row[0] for row in table.rows] == ["base and adapter", "merged", "merged-f16.gguf", "merged-q8_0.gguf"]
    assert [row[2] for row in table.rows[:3]] == ["", "8 of 8", "8 of 8"]
    assert int(table.rows[3][2].split()[0]) >= 6, "8 bits may tip a choice between two words"
    assert [row[3] for row in table.rows] == ["8 of 8"] * 4


def test_another_models_answers_are_told_apart(tuned_run, merged, tmp_path):
    """The base without its adapter, as if the merge had lost it."""
    model, tokenizer = load_adapter(tuned_run.folder)
    with model.disable_adapter():
        table = same_answers(model, tokenizer, QUESTIONS, [merged])
    assert table.rows[1][2] == "0 of 8"


def test_what_does_not_fit_is_said_and_the_others_still_asked(tuned_run, merged, monkeypatch):
    model, tokenizer = load_adapter(tuned_run.folder)
    monkeypatch.setattr(reload, "host_memory", lambda: (16.0, 0.001, 16.0))
    table = same_answers(model, tokenizer, QUESTIONS[:2], [merged, merged / "no.gguf"])
    assert "not loaded: it takes 0.0" in table.rows[1][2]
    assert "neither a folder" in table.rows[2][2]
    with pytest.raises(ModelError, match="does not fit here"):
        load_merged(merged)


def test_its_size_is_counted_in_weights(merged):
    parameters = sum(p.numel() for p in load_merged(merged).parameters())
    files = [merged, *(to_gguf(merged, kind=kind) for kind in ("f16", "q8_0"))]
    assert [reload._parameters(path) / parameters for path in files] == pytest.approx([1] * 3, rel=0.1)


def test_no_question_is_an_error(tuned_run):
    with pytest.raises(RecipeError, match="nothing can be compared"):
        same_answers(None, None, [], [])
