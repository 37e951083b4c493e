"""Talking to a model, and the form over it through its widgets' traits."""

import itertools
import re
import threading

import pytest
import torch

from llamanb import Chat, chat_form, load_adapter
from llamanb.chat import OFF, ON, ChatError
from llamanb.errors import RecipeError
from llamanb.tiny import rows
from tests.unit.hostile import MARKUP

NOTES = [row["messages"][0]["content"] for row in rows("eval", count=6)]


@pytest.fixture(scope="module")
def tuned(tuned_run):
    return load_adapter(tuned_run.folder)


@pytest.fixture
def chat(tuned):
    return Chat(*tuned, max_new_tokens=40)


def test_it_answers_as_in_the_scores_and_stops_by_itself(tuned_run, chat):
    for question, wanted in zip(tuned_run.scores.questions, tuned_run.scores.after.answers, strict=True):
        chat.clear()
        assert chat.say(question) == wanted
    assert len(wanted) < 120


def test_an_answer_comes_piece_by_piece(chat):
    heard = []
    answer = chat.say(NOTES[0], heard.append)
    assert len(heard) > 5
    assert heard[-1].strip() == answer
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(heard))


def test_the_adapter_is_switched_off_and_on(tuned_run, chat):
    question, before, after = (
        tuned_run.scores.questions[0],
        tuned_run.scores.before.answers[0],
        tuned_run.scores.after.answers[0],
    )
    chat.adapter = False
    without = chat.say(question)
    assert without.startswith(before) or before.startswith(without)
    chat.clear()
    chat.adapter = True
    assert chat.say(question) == after != without
    chat.adapter = False
    chat.say("And then?")
    assert [who for who, _ in chat._table().rows] == ["you", ON, "you", OFF]
    assert f"{ON}: {after}" in str(chat)


def test_a_turn_depends_on_those_before_it(chat):
    prompts = []
    tokenizer = chat.tokenizer

    class Spy:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, **options):
            prompts.append(text)
            return tokenizer(text, **options)

    chat.tokenizer, chat.system = Spy(), "Be short."
    first = chat.say(NOTES[0])
    chat.say(NOTES[1])
    assert prompts[1].startswith(prompts[0])
    assert first in prompts[1]
    assert prompts[1].count("Be short.") == 1
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_what_is_drawn_can_be_drawn_again(tuned):
    state, said = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        chat = Chat(*tuned, temperature=2.0, seed=seed, max_new_tokens=40)
        said.append([chat.say(NOTES[0]), chat.say(NOTES[0])])
    assert said[0] == said[1] != said[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_long_conversation_forgets_its_oldest_turns(chat):
    for _ in range(12):
        chat.say(NOTES[0])
    assert len(chat.messages) == 24
    assert chat.forgotten > 0
    assert chat.forgotten % 2 == 0


def test_memory_that_runs_out_forgets_too(chat, monkeypatch):
    chat.say(NOTES[0])
    generate, seen = type(chat.model).generate, []

    def narrow(self, **options):
        seen.append(options["input_ids"].shape[1])
        if seen[-1] > 90:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(self, **options)

    monkeypatch.setattr(type(chat.model), "generate", narrow)
    assert chat.say(NOTES[1])
    assert (len(seen), chat.forgotten) == (2, 2)
    monkeypatch.setattr(
        type(chat.model), "generate", lambda self, **options: narrow(self, **options) if False else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        chat.say(NOTES[2])
    assert len(chat.messages) == 4, "nothing is kept of a turn that failed"
    monkeypatch.undo()
    assert chat.say(NOTES[2])


@pytest.mark.parametrize(
    ("text", "why"),
    [("  ", "empty"), ("a<|eot_id|>b", "control token"), ("word " * 600, "positions")],
)
def test_what_cannot_be_said(chat, text, why):
    with pytest.raises(ChatError, match=why):
        chat.say(text)
    assert chat.messages == []


def test_a_temperature_below_zero_is_refused(tuned):
    with pytest.raises(RecipeError, match="temperature"):
        Chat(*tuned, temperature=-1)


def test_one_answer_at_a_time_and_it_can_be_stopped(chat):
    begun, go_on, refused = threading.Event(), threading.Event(), []

    def heard(text):
        begun.set()
        assert go_on.wait(60)

    thread = threading.Thread(target=chat.say, args=(NOTES[0], heard))
    thread.start()
    assert begun.wait(60)
    try:
        chat.say("Me too!")
    except ChatError as error:
        refused.append(error)
    chat.stop()
    go_on.set()
    thread.join()
    assert len(refused) == 1
    whole, stopped = Chat(chat.model, chat.tokenizer, max_new_tokens=40).say(NOTES[0]), chat.messages[1]["content"]
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)


# the form


def said(form) -> str:
    return form._said.value + form._answer.value + form._message.value


def test_the_form_goes_on_with_a_conversation(chat, tuned_run):
    chat.say(NOTES[0])
    form = chat_form(chat)
    assert chat.messages[1]["content"].split()[0] in said(form)
    form.turn.value = tuned_run.scores.questions[0]
    form.send.click()
    form.wait()
    assert len(chat.messages) == 4
    assert (form.turn.value, form.send.disabled, form.stop.disabled) == ("", False, True)
    form.adapter.value = False
    form.turn.value = "And without?"
    form.send.click()
    form.wait()
    assert OFF in said(form)
    form.clear.click()
    assert (chat.messages, said(form)) == ([], "")


def test_the_form_shows_the_answer_as_it_comes_and_stops_it(chat):
    form, seen = chat_form(chat), []

    def watch(change):
        seen.append((form.send.disabled, form.stop.disabled))
        form.stop.click()

    form._answer.observe(watch, names="value")
    form.turn.value = NOTES[0]
    form.send.click()
    form.wait()
    assert seen[0] == (True, False)
    whole = Chat(chat.model, chat.tokenizer, max_new_tokens=40).say(NOTES[0])
    assert len(chat.messages[1]["content"]) < len(whole)


def test_the_form_says_what_went_wrong_and_keeps_the_text(chat, monkeypatch):
    form = chat_form(chat)
    form.turn.value = "a<|eot_id|>b"
    form.send.click()
    form.wait()
    assert "control token" in said(form)
    assert "&lt;|eot_id|&gt;" in said(form)
    assert form.turn.value == "a<|eot_id|>b"

    def broken(*args):
        raise RuntimeError("<b>no</b>")

    monkeypatch.setattr(Chat, "_said", broken)
    form.turn.value = "Hello"
    form.send.click()
    form.wait()
    assert "&lt;b&gt;no" in said(form)
    assert (form.turn.value, form.send.disabled) == ("Hello", False)


def test_nothing_that_is_said_becomes_markup(chat, monkeypatch):
    """While the answer comes; the conversation itself is a sink of test_hostile.py."""
    form, seen = chat_form(chat), []
    form._answer.observe(lambda change: seen.append(change["new"]), names="value")
    for text in MARKUP:
        monkeypatch.setattr(Chat, "_said", lambda self, ids, heard, text=text: heard(text) or text)
        form.turn.value = text
        form.send.click()
        form.wait()
    assert len(seen) >= 2 * len(MARKUP)
    assert {tag for shown in seen for tag in re.findall(r"<(\w+)", shown)} <= {"div", "span"}


def test_without_an_adapter_there_is_nothing_to_switch(tuned):
    form = chat_form(Chat(tuned[0].get_base_model(), tuned[1]))
    assert (form.adapter.disabled, form.adapter.value) == (True, False)
