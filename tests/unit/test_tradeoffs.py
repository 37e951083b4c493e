"""Techniques measured against each other: what is run and what is read back, and verdicts in both directions."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llamanb import Recipe, load_data, plan, tradeoffs
from llamanb.card import Card
from llamanb.claims import mib
from llamanb.data.encode import IGNORE
from llamanb.errors import RecipeError
from llamanb.layout import GIB
from llamanb.run import FINISHED, Run
from llamanb.tape import CHECKPOINTED, STORED
from llamanb.timeline import Sample, Step, Timeline
from llamanb.tradeoffs import CLAIMS, NEEDS_GPU, NOT_MEASURED, Row, Tradeoffs, Variant, measure, variants

RECIPE = Recipe(effective_batch_size=4, micro_batch_size=2, max_length=64, steps=3, eval_rows=0, learning_rate=5e-3)
FOUND = variants(RECIPE)
ON_CPU = plan(RECIPE, Card("CPU", None))
ON_GPU = plan(RECIPE, "T4")
OUT = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


def row(name: str, peak_mib=4000.0, speed=1000.0, *, gpu=True, forward_mib=None, held=None, reserved_mib=5000.0) -> Row:
    """A variant as if it had been measured."""
    timeline = Timeline("VRAM in use (test)")
    timeline.steps = [Step(i, float(i), 2.0 / i, 1e-4, 1.0, int(i * speed)) for i in range(1, 5)]
    if gpu:
        timeline.samples = [Sample(0.1, "forward", 9.0, 1.0, reserved_mib / 1024)]
        peaks = {"load": 9000, "forward": forward_mib or peak_mib / 2, "loss": peak_mib / 2, "backward": peak_mib}
        timeline.peaks_gib = {part: mib / 1024 for part, mib in peaks.items()}
    held = {"weights": 900.0, "adapters": 40.0, "gradients": 40.0, "optimizer": 20.0} if held is None else held
    buckets = {bucket: mib / 1024 for bucket, mib in held.items()}
    run = Run(Path(f"runs/{name}"), ON_GPU if gpu else ON_CPU, timeline, status=FINISHED, buckets_gib=buckets)
    return Row(FOUND[name], run)


def these(**failed_or_rows) -> Tradeoffs:
    return Tradeoffs({name.replace("_", " "): one for name, one in failed_or_rows.items()})


def verdict(said: str, rows: list[Row] | dict) -> tuple[str, str]:
    """What becomes of a claim, from rows named by their variants or by hand."""
    if not isinstance(rows, dict):
        names = {variant: name for name, variant in reversed(FOUND.items())}
        rows = {names[one.variant]: one for one in rows}
    (found,) = (line for line in Tradeoffs(rows).verdicts().rows if line[0] == said)
    return tuple(found[1:])


def pair(one: str, other: str, **figures) -> dict:
    """Two rows that differ in each of the figures given, as (of the first, of the second)."""
    return {
        name: row(name, **{figure: values[at] for figure, values in figures.items()})
        for at, name in enumerate((one, other))
    }


SPEEDS = {
    "int8 is faster than 4-bit": ("int8", "transformers' layers"),
    "padding costs speed": ("transformers' layers", "rows, padded"),
    "quantizing to 4 bits costs speed": ("unquantized", "nf4"),
    "gradient accumulation costs speed": ("micro-batch 4", "micro-batch 1"),
}


@pytest.mark.parametrize("said", SPEEDS)
@pytest.mark.parametrize(("speed", "holds"), [(1500, "true here"), (1020, "false here"), (600, "false here")])
def test_speed_decides_and_a_difference_within_the_noise_is_none(said, speed, holds):
    one, other = SPEEDS[said]
    found, figures = verdict(said, pair(one, other, speed=(speed, 1000)))
    assert found == holds
    assert figures == f"{one} has {speed / 1000:.2f} times the speed of {other}"


MEMORY = {
    "double quantization saves much memory": ("nf4", "single quantization", -1),
    "PagedAdamW saves much memory": ("paged 8-bit AdamW", "8-bit AdamW", -1),
    "a higher rank needs much more memory": ("rank times 4", "baseline", 1),
}


@pytest.mark.parametrize("said", MEMORY)
@pytest.mark.parametrize(("share", "holds"), [(0.2, "true here"), (0.02, "false here"), (-0.2, "false here")])
def test_memory_at_the_peak_decides_from_a_tenth_on(said, share, holds):
    one, other, sign = MEMORY[said]
    found, figures = verdict(said, pair(one, other, peak_mib=(4000 * (1 + sign * share), 4000)))
    assert found == holds
    assert f"{sign * share:+.1%}" in figures
    assert f"{other} at 4,000" in figures


@pytest.mark.parametrize(
    ("gone", "holds"), [(0, "false here"), (20, "false here"), (60, "true here"), (900, "true here")]
)
def test_paged_parameters_would_take_more_off_the_peak_than_the_states_are(gone, holds):
    rows = pair("paged 8-bit AdamW", "8-bit AdamW", peak_mib=(4000 - gone, 4000))
    found, figures = verdict("PagedAdamW moves the parameters to host memory", rows)
    assert found == holds
    states = "the optimizer's states are 20.0, adapters 40.0, all that lasts 1,000"
    assert figures == f"the peak falls by {mib(gone / 1024)} MiB; {states}"


def lengths(efficient: tuple, math: tuple) -> dict:
    """Rows with activations, MiB, at half and at full length."""
    names = [f"{kernel}{at}" for kernel in ("memory-efficient", "math") for at in (" at half length", "")]
    sizes = zip(names, (*efficient, *math), strict=True)
    return {name: row(name, forward_mib=1000 + size) for name, size in sizes}


@pytest.mark.parametrize(
    ("efficient", "math", "plainly", "added"),
    [
        ((800, 1600), (1400, 4000), "false here", "true here"),  # in proportion; what math adds: 600, 2400
        ((800, 3200), (1400, 4400), "true here", "false here"),  # 600, 1200
    ],
)
def test_the_square_of_the_length_is_told_from_proportion(efficient, math, plainly, added):
    rows = lengths(efficient, math)
    found, figures = verdict("activations grow with the square of the length", rows)
    assert found == plainly
    times = f"at 2.0 times the length, {efficient[1] / efficient[0]:.1f} times as much"
    assert figures == f"activations, memory-efficient: 800 MiB, and {efficient[1]:,} {times}"
    found, figures = verdict("they do without a memory-efficient kernel", rows)
    assert found == added
    assert figures.startswith("what math adds to memory-efficient: 600 MiB")


def test_activations_too_small_to_tell_are_not_measured():
    found = verdict("activations grow with the square of the length", lengths((-5, 10), (20, 40)))
    assert found == (NOT_MEASURED, "the activations are too small to be told from the rest")


def test_all_layers_need_checkpointing_only_where_fewer_run_out_of_memory():
    said, out = (
        "all layers must be checkpointed",
        {name: Row(FOUND[name], failed=OUT) for name in ("keep all", "recompute half")},
    )
    every = {"recompute all": row("recompute all", reserved_mib=2000)}
    kept = {"keep all": row("keep all", speed=1400, reserved_mib=5000)}
    figures = "keep all fits too: 5,000 MiB reserved instead of 2,000, at 1.40 times the speed"
    assert verdict(said, kept | every) == ("false here", figures)
    half = {"recompute half": row("recompute half", speed=1200)}
    found, figures = verdict(said, out | half | every)
    assert found == "false here"
    assert figures.startswith("recompute half fits too")
    assert verdict(said, out | every) == ("true here", "with fewer memory ran out; with all, 2,000 MiB are reserved")
    other = {"keep all": Row(FOUND["keep all"], failed="OSError: no such file")}
    assert verdict(said, other | half | every) == (NOT_MEASURED, "keep all: OSError: no such file")
    assert verdict(said, kept) == (NOT_MEASURED, "recompute all: not run")


@pytest.mark.parametrize("said", [said for said, _, _ in CLAIMS])
def test_what_was_not_measured_has_no_verdict(said):
    assert verdict(said, {"attention only": row("attention only")})[0] == NOT_MEASURED
    failed = {name: Row(variant, failed="int8 needs another card") for name, variant in FOUND.items()}
    found, figures = verdict(said, failed | {"attention only": row("attention only")})
    assert found == NOT_MEASURED
    assert figures.endswith(": int8 needs another card")
    assert verdict(said, {})[0] == NOT_MEASURED


def test_on_a_cpu_memory_is_the_host_s_and_verdicts_on_a_gpu_s_need_one():
    found = Tradeoffs({name: row(name, gpu=False) for name in FOUND})
    for said, judged, _ in found.verdicts().rows:
        assert (judged == NEEDS_GPU) == (
            said not in ("quantizing to 4 bits costs speed", "gradient accumulation costs speed")
        )
    assert found.table().headers[1] == "lasting host memory, MiB"
    assert found.table().rows[0] == ["baseline", "1,000", "1,000", "+0%", "0.500"]
    assert found.memory().headers == ["variant", "weights", "adapters", "gradients", "optimizer"]
    assert found.memory().caption.startswith("host memory")
    assert "MiB of host memory that last" in repr(found.picture())


def test_a_gpu_s_table_has_peaks_and_reserved_and_a_failure_its_reason():
    rows = {"baseline": row("baseline"), "fp4": row("fp4", speed=1500), "int8": Row(FOUND["int8"], failed=OUT)}
    found = Tradeoffs(rows)
    assert found.table().headers == [
        "variant",
        "peak, MiB",
        "in the",
        "reserved, MiB",
        "tokens/s",
        "to baseline",
        "last loss, or why none",
    ]
    assert found.table().rows[1] == ["fp4", "4,000", "backward", "5,000", "1,500", "+50%", "0.500"]
    assert found.table().rows[2] == ["int8", "", "", "", "", "", OUT]
    assert found.memory().rows[0] == [
        "baseline",
        "900",
        "40.0",
        "40.0",
        "20.0",
        "9,000",
        "2,000",
        "2,000",
        "4,000",
        "0.0",
    ]
    assert [line[0] for line in found.memory().rows] == ["baseline", "fp4"]
    assert repr(found.picture()).count("tokens/s") == 2
    assert "4 × 64 tokens a step, auto, on T4" in found.table().caption


def test_one_run_under_several_names_is_one_point_under_its_first():
    once = row("baseline")
    words = repr(Tradeoffs({"baseline": once, "nf4": once, "fp4": row("fp4"), "keep all": once}).picture())
    assert [part.split(":")[0] for part in words.split("; ")] == ["baseline", "fp4"]


def test_speed_is_the_middle_step_s_and_the_first_does_not_count():
    found = row("baseline")
    found.run.timeline.steps = [Step(i, at, 1.0, 1.0, 1.0, 100 * i) for i, at in enumerate((50.0, 51.0, 52.0, 99.0), 1)]
    assert found.speed == 100.0
    found.run.timeline.steps = found.run.timeline.steps[:1]
    assert found.speed == 0.0
    with pytest.raises(LookupError, match="baseline: not run"):
        Tradeoffs({"baseline": found}).ran("baseline")


def test_each_variant_changes_one_thing():
    def changed(variant: Variant) -> set[str]:
        before, after = dataclasses.asdict(FOUND["baseline"]), dataclasses.asdict(variant)
        before |= before.pop("recipe")
        after |= after.pop("recipe")
        return {name for name in before if before[name] != after[name]}

    assert changed(FOUND["baseline"]) == changed(FOUND["nf4"]) == changed(FOUND["micro-batch 2"]) == set()
    several = {"recompute half": {"checkpointing", "half"}, "math": {"kernel", "micro_batch_size", "fused"}}
    several |= {"rows, padded": {"rows", "fused"}}
    several |= {"memory-efficient": several["math"]}
    several |= {f"{kernel} at half length": {*several["math"], "max_length"} for kernel in ("math", "memory-efficient")}
    for name, variant in FOUND.items():
        assert changed(variant) == several[name] if name in several else len(changed(variant)) <= 1, name
    assert FOUND["math at half length"].recipe.max_length == 32
    assert "micro-batch 4" not in variants(RECIPE.replace(effective_batch_size=6))


def test_what_a_plan_would_choose_otherwise_is_settled_alike_for_all():
    auto = Recipe(effective_batch_size=4)
    on_t4 = tradeoffs._settled(auto, (7, 5))
    assert (on_t4.precision, on_t4.optimizer, on_t4.checkpointing) == ("fp16", "paged_adamw_8bit", "none")
    assert (on_t4.micro_batch_size, on_t4.steps, on_t4.eval_rows) == (2, tradeoffs.STEPS, 0)
    on_cpu = tradeoffs._settled(auto.replace(effective_batch_size=3), None)
    assert (on_cpu.precision, on_cpu.optimizer, on_cpu.micro_batch_size) == ("fp32", "adamw_torch_fused", 1)
    asked = auto.replace(checkpointing="all", optimizer="adamw_8bit", micro_batch_size=4, precision="fp32", steps=5)
    assert tradeoffs._settled(asked, (9, 0)) == asked.replace(eval_rows=0)
    assert variants(on_t4)["baseline"] == variants(on_t4)["fp16"] == variants(on_t4)["paged 8-bit AdamW"]


def test_rows_are_cut_to_one_length_and_every_piece_teaches():
    data = tradeoffs._pieces(RECIPE)
    assert data.lengths == [64] * 12
    assert all(any(label != IGNORE for label in piece.labels[1:]) for piece in data.train)
    assert data.train[0].input_ids[:20] == load_data(RECIPE.replace(max_length=128)).train[0].input_ids[:20]


class Child:
    """Stands in for subprocess.run: trains nothing, leaves a run's folder or an error."""

    def __init__(self, status=FINISHED, stderr="", returncode=0):
        self.asked, self.answer = [], (status, stderr, returncode)

    def __call__(self, command, env, **options):
        variant, runs, name = command[-3:]
        self.asked.append((json.loads(variant), name, env["PYTORCH_ALLOC_CONF"]))
        status, stderr, returncode = self.answer
        if not returncode:
            folder = Path(runs) / name
            folder.mkdir(parents=True)
            (folder / "plan.json").write_text(ON_CPU.to_json())
            row("baseline", gpu=False).run.replace(folder=folder, status=status).save()
        return subprocess.CompletedProcess(command, returncode, "", stderr)


def test_what_was_measured_is_not_run_again(tmp_path, monkeypatch, capsys):
    child = Child()
    monkeypatch.setattr(tradeoffs.subprocess, "run", child)
    found = measure(RECIPE, "unquantized, nf4, fixed segments", runs=tmp_path)
    assert [name.rpartition("-")[0] for _, name, _ in child.asked] == ["baseline", "unquantized"]
    assert list(found.rows) == ["baseline", "nf4", "unquantized", "fixed segments"]
    assert found.rows["nf4"].run.folder == found.rows["baseline"].run.folder
    assert found.rows["fixed segments"].failed == NEEDS_GPU
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 of 4  baseline: 1,000 MiB of host memory, 1,000 tokens/s"
    assert lines[1].endswith("1,000 tokens/s, as measured before")
    assert lines[3] == "4 of 4  fixed segments: needs a GPU"

    measure(RECIPE, ["unquantized", "int8"], runs=tmp_path)
    assert [name.rpartition("-")[0] for _, name, _ in child.asked[2:]] == ["int8"]
    measure(RECIPE.replace(rank=8), ["unquantized"], runs=tmp_path)
    assert len(child.asked) == 5  # another recipe, other runs
    monkeypatch.setattr(tradeoffs, "_device", lambda: ("a GPU", (9, 0)))
    measure(tradeoffs._settled(RECIPE, None), "fixed segments", runs=tmp_path)
    assert [asked[2][-4:] for asked in child.asked[5:]] == ["True", "alse"]  # another device, other runs


def test_a_run_that_did_not_end_is_run_again(tmp_path, monkeypatch):
    child = Child(status="running")
    monkeypatch.setattr(tradeoffs.subprocess, "run", child)
    assert measure(RECIPE, "baseline", runs=tmp_path).rows["baseline"].failed == "its process ended with 0"
    again = Child()
    again.__dict__["asked"] = child.asked
    for folder in tmp_path.iterdir():
        folder.rename(folder.with_name(f"{folder.name}-2"))  # the next of that name, as train() counts
    monkeypatch.setattr(tradeoffs.subprocess, "run", again)
    assert measure(RECIPE, "baseline", runs=tmp_path).rows["baseline"].run.status == FINISHED
    assert len(child.asked) == 2


@pytest.mark.parametrize(
    ("stderr", "returncode", "reason"),
    [
        (f"ValueWarning\nTraceback\n{OUT}\n\na warning at the end", 1, OUT),
        ("SomeError: and then it was killed", -9, "its process ended with -9"),
        ("", 3, "its process ended with 3"),
    ],
)
def test_a_failing_child_is_a_row_with_its_reason(tmp_path, monkeypatch, stderr, returncode, reason):
    monkeypatch.setattr(tradeoffs.subprocess, "run", Child(stderr=stderr, returncode=returncode))
    found = measure(RECIPE, "int8", runs=tmp_path)
    assert found.rows["int8"].failed == reason
    assert found.table().rows[-1][-1] == reason
    assert found.table().caption == "nothing was measured"
    assert repr(found.picture()) == "nothing was measured"


def test_a_name_that_is_no_variant_s_says_which_there_are():
    with pytest.raises(RecipeError, match="no variant is called 'int9'") as caught:
        measure(RECIPE, "int8, int9")
    assert "rank times 4" in caught.value.why


@pytest.mark.parametrize("name", ["recompute half", "memory-efficient", "math"])
def test_what_a_recipe_cannot_say_reaches_the_plan_and_torch(name, tmp_path, monkeypatch):
    import torch

    switched, trained = {}, []
    for switch in ("flash", "cudnn", "mem_efficient", "math"):
        monkeypatch.setattr(
            torch.backends.cuda, f"enable_{switch}_sdp", lambda on, switch=switch: switched.update({switch: on})
        )
    for left in ("adapter", "checkpoints"):
        (tmp_path / left).mkdir()

    def train(made, data, **where):
        trained.append((made, data, where))
        return Run(tmp_path, made, Timeline("test"))

    monkeypatch.setattr(tradeoffs, "train", train)
    tradeoffs.train_variant(FOUND[name], str(tmp_path), "some-name")
    [(made, data, where)] = trained
    assert where == {"name": "some-name", "runs": str(tmp_path), "resume": False}
    assert set(data.lengths) == {64}
    assert list(tmp_path.iterdir()) == []
    if name == "recompute half":
        assert made.layers == (CHECKPOINTED, CHECKPOINTED, STORED, STORED)
        assert switched == {}
    else:
        assert made.attention == {"math": "sdpa", "memory-efficient": "llamanb_expanded"}[name]
        assert {switch for switch, on in switched.items() if on} == {
            "math",
            "math" if name == "math" else "mem_efficient",
        }


@pytest.mark.slow
def test_the_command_line_measures_in_fresh_processes_and_keeps_tables_and_picture(tmp_path):
    asked = {"max_length": 64, "effective_batch_size": 2, "steps": 2, "learning_rate": 5e-3}
    command = [sys.executable, "-m", "llamanb.tradeoffs", json.dumps(asked), str(tmp_path), "nf4,fp16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "3 of 3  fp16: " in done.stdout
    assert "llamanb does on a GPU only" in done.stdout
    kept = (tmp_path / "tradeoffs.txt").read_text()
    assert done.stdout.endswith(kept)
    assert "baseline" in kept
    assert (tmp_path / "tradeoffs.png").read_bytes().startswith(b"\x89PNG")
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir()]
    run = Run.open(folder)
    assert run.plan.recipe.steps == len(run.timeline.steps) == 2
    assert run.timeline.steps[-1].tokens == 2 * 2 * 64
    assert not {"adapter", "checkpoints"} & {path.name for path in folder.iterdir()}
    assert 0 < sum(run.buckets_gib.values()) * GIB < 10 * 2**20
