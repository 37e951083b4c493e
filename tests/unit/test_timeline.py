"""What a run was seen to do, written as it goes and read again, whatever became of the run."""

import csv
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamanb.plots import PHASES
from llamanb.timeline import FACTS, MEMORY, METRICS, Sample, Step, Timeline

sizes = st.floats(min_value=0, max_value=1000)
samples = st.builds(
    Sample,
    time_s=st.floats(min_value=0, max_value=1e6),
    phase=st.sampled_from([*PHASES]),
    used_gib=sizes,
    allocated_gib=st.none() | sizes,
    reserved_gib=st.none() | sizes,
)
steps = st.builds(
    Step,
    step=st.integers(1, 10**9),
    time_s=st.floats(min_value=0, max_value=1e6),
    loss=st.floats(),  # nan and inf too
    learning_rate=st.floats(min_value=0, max_value=1),
    grad_norm=st.floats(),
    tokens=st.integers(0, 2**53),
    scale=st.floats(min_value=0, max_value=2.0**24),
)
facts = st.fixed_dictionaries(
    {
        "source": st.text(),
        "limit_gib": st.none() | sizes,
        "planned_gib": st.none() | sizes,
        "peaks_gib": st.dictionaries(st.sampled_from([*PHASES]), sizes),
        "missing": st.text(),
        "returns": st.lists(st.lists(st.integers(1, 10**9), min_size=2, max_size=2), max_size=3),
    }
)
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def sample(time_s: float, used_gib: float = 1.0, phase: str = "forward") -> Sample:
    return Sample(time_s, phase, used_gib, 0.5, 0.75)


def step(number: int, time_s: float = 0.0, loss: float = 1.0, tokens: int = 0) -> Step:
    return Step(number, time_s, loss, 2e-4, 0.5, tokens)


def written(folder, *, samples=(), steps=(), **facts) -> Timeline:
    made = Timeline("VRAM in use (test)", samples=list(samples), steps=list(steps), **facts)
    made.write(folder)
    return made


@many
@given(facts=facts, parts=st.lists(st.tuples(st.lists(samples, max_size=5), st.lists(steps, max_size=3)), max_size=5))
def test_what_is_written_part_by_part_is_read_as_a_whole(tmp_path, facts, parts):
    made = Timeline(**facts)
    for more_samples, more_steps in parts:
        for one in more_samples:
            made.add(one)
        made.steps += more_steps
        made.write(tmp_path)
    made.write(tmp_path)  # nothing new
    again = Timeline.read(tmp_path)
    assert again.samples == made.samples
    assert repr(again.steps) == repr(made.steps), "as text, for nan is not itself"
    assert {name: getattr(again, name) for name in facts} == facts
    assert (again.peak_gib, again.phases) == (made.peak_gib, made.phases)


def test_files_are_for_other_programs_too(tmp_path):
    written(tmp_path, samples=[sample(0.1), Sample(0.2, "load", 2.0, None, None)], steps=[step(1, loss=math.inf)])
    with (tmp_path / MEMORY).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == ["forward", "load"]
    assert (rows[0]["reserved_gib"], rows[1]["reserved_gib"]) == ("0.75", "")
    assert (tmp_path / METRICS).read_text().splitlines()[
        0
    ] == "step,time_s,loss,learning_rate,grad_norm,tokens,scale,stall_s"
    assert json.loads((tmp_path / FACTS).read_text())["source"] == "VRAM in use (test)"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([MEMORY, METRICS, FACTS])


def test_a_run_from_before_stalls_were_written_is_read(tmp_path):
    Timeline("fake", steps=[Step(1, 0.5, 2.0, 2e-4, 0.5, 100, 4.0)]).write(tmp_path)
    header = "step,time_s,loss,learning_rate,grad_norm,tokens,scale"
    (tmp_path / METRICS).write_text(f"{header}\n1,0.5,2.0,0.0002,0.5,100,4.0\n2,0.5,2.0\n")
    assert Timeline.read(tmp_path).steps == [Step(1, 0.5, 2.0, 2e-4, 0.5, 100, 4.0, 0.0)]


def test_what_was_written_is_not_written_again(tmp_path):
    made = written(tmp_path, samples=[sample(0.1)])
    before = (tmp_path / MEMORY).read_bytes()
    made.add(sample(0.2))
    made.write(tmp_path)
    after = (tmp_path / MEMORY).read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == before.count(b"\n") + 1


@many
@given(data=st.data())
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, data):
    """Wherever it was cut: half a number is a number too."""
    all_samples = [sample(0.125 * i, 10.0625 + i) for i in range(5)]
    all_steps = [step(i, i * 1e-7, loss=1e-5 / 3, tokens=1234567 * i) for i in range(1, 5)]
    written(tmp_path, samples=all_samples, steps=all_steps)
    for name in (MEMORY, METRICS):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: data.draw(st.integers(0, len(whole)), label=name)])
    again = Timeline.read(tmp_path)
    complete = [(tmp_path / name).read_bytes().count(b"\n") - 1 for name in (MEMORY, METRICS)]
    assert again.samples == all_samples[: max(0, complete[0])]
    assert again.steps == all_steps[: max(0, complete[1])]


def test_a_run_that_died_half_way_is_read_as_far_as_it_was_written(tmp_path):
    made = written(tmp_path, samples=[sample(0.0, phase="load")], planned_gib=3.0)
    made.add(sample(1.0, 2.5))
    made.add(sample(2.0, 2.0, "loss"))
    made.steps.append(step(1))
    made.peaks_gib["load"] = 1.5
    made.write(tmp_path)
    made.add(sample(3.0, 9.0))  # and then it died
    again = Timeline.read(tmp_path)
    assert [s.time_s for s in again.samples] == [0.0, 1.0, 2.0]
    assert again.peak_gib == 2.5
    assert again.phases == ["load", "forward", "loss"]
    assert again.peaks_gib == {"load": 1.5}
    assert again.planned_gib == 3.0
    assert again.phase == "over"


def test_a_run_that_died_at_once_has_nothing_to_tell(tmp_path):
    written(tmp_path)
    again = Timeline.read(tmp_path)
    assert (again.samples, again.steps, again.peak_gib, again.phases) == ([], [], 0.0, [])


def test_facts_are_whole_even_if_a_run_dies_while_they_are_written(tmp_path, monkeypatch):
    made = written(tmp_path, limit_gib=15.0)
    with monkeypatch.context() as dying:
        dying.setattr("llamanb.timeline.json.dumps", lambda *args, **kwargs: '{"source": "VR')
        dying.setattr("pathlib.Path.replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made.write(tmp_path)
    assert Timeline.read(tmp_path).limit_gib == 15.0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sources": 1}', '"a"', "\ufeff", '{"source": "", "returns": [3]}'])
def test_facts_that_are_none_are_an_error(tmp_path, text):
    written(tmp_path)
    (tmp_path / FACTS).write_text(text)
    with pytest.raises((ValueError, TypeError)):
        Timeline.read(tmp_path)


@pytest.mark.parametrize("name", [FACTS, MEMORY, METRICS])
def test_a_missing_file_is_an_error(tmp_path, name):
    written(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(OSError, match=name):
        Timeline.read(tmp_path)


def test_a_return_forgets_steps_in_the_file_too_and_is_noted(tmp_path):
    made = written(tmp_path, steps=[step(n, 1.0 * n, tokens=10 * n) for n in range(1, 8)], samples=[sample(0.5)])
    made.go_back(made.steps[:3])
    made.write(tmp_path)
    again = Timeline.read(tmp_path)
    assert [s.step for s in again.steps] == [s.step for s in made.steps] == [1, 2, 3]
    assert (again.returns, again.samples) == ([[7, 3]], [sample(0.5)])
    assert made.tokens_per_s is None, "of the steps since then"
    made.steps += [step(4, 10.0, tokens=100), step(5, 12.0, tokens=140)]
    made.write(tmp_path)
    assert [s.step for s in Timeline.read(tmp_path).steps] == [1, 2, 3, 4, 5]
    assert made.tokens_per_s == 20


def test_a_session_knows_the_returns_of_the_one_before_whatever_its_checkpoint_knows(tmp_path):
    written(tmp_path, steps=[step(1)], returns=[[9, 3], [8, 3]])
    for known, found in (([], [[9, 3], [8, 3]]), ([[9, 3]], [[9, 3], [8, 3]]), ([[1, 1]] * 3, [[1, 1]] * 3)):
        made = Timeline("test")
        made.follow(tmp_path, [step(1)], known)
        assert made.returns == found
    (tmp_path / FACTS).write_text("{")
    made.follow(tmp_path, [step(1)], [[9, 3]])
    assert made.returns == [[9, 3]]


def test_what_was_not_finite_in_words():
    fine, bad, worse = step(1), step(2, loss=math.nan), Step(3, 0.0, 1.0, 2e-4, math.inf, 0)
    assert [s.skipped for s in (fine, bad, worse)] == [False, True, True]
    made = Timeline("test")
    assert made.upsets == ""
    made.steps += [fine, bad, worse]
    assert made.upsets == "2 skipped, not finite"
    made.returns.append([9, 3])
    assert made.upsets == "2 skipped, not finite, back from step 9 to 3 with half the learning rate"
    made.steps[:] = [fine._replace(scale=65536.0), worse._replace(scale=65536.0), fine._replace(scale=32768.0)]
    assert made.upsets.startswith("1 skipped, not finite (fp16's scale 65536 at first, now 32768), back from")


def test_tokens_a_second_leave_the_first_step_out():
    timeline = Timeline("test", steps=[step(1, time_s=100.0, tokens=1000)])
    assert timeline.tokens_per_s is None
    timeline.steps.append(step(2, time_s=102.0, tokens=2000))
    assert timeline.tokens_per_s == pytest.approx(500.0)
    timeline.steps.append(step(3, time_s=108.0, tokens=5000))
    assert timeline.tokens_per_s == pytest.approx(500.0)


def test_two_steps_at_one_moment_are_no_division_by_zero():
    timeline = Timeline("test", steps=[step(1, 1.0, tokens=5), step(2, 1.0, tokens=10)])
    assert math.isfinite(timeline.tokens_per_s)


def test_phases_are_in_the_order_of_their_first_sample():
    order = ["import", "load", "score", "forward", "loss", "backward", "forward", "loss", "save", "score"]
    timeline = Timeline("test", samples=[sample(i, phase=phase) for i, phase in enumerate(order)])
    assert timeline.phases == ["import", "load", "score", "forward", "loss", "backward", "save"]


def test_time_begins_with_the_timeline(monkeypatch):
    now = [50.0]
    monkeypatch.setattr("llamanb.timeline.time.monotonic", lambda: now[0])
    timeline = Timeline("test")
    now[0] = 53.5
    assert timeline.time_s == 3.5
