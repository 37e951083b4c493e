"""The speed benchmark's pure parts: which kernel is what, times from events, turns, and verdicts, by hand."""

import itertools
import json
from types import SimpleNamespace

import pytest

from benchmarks import speed, speed_report
from benchmarks.speed_kernels import LINK, MATRIX, OTHER, WITHIN, Event, Ratios, kind_of, summary, t4_seconds, union_ns
from benchmarks.speed_processes import MOST_FAILURES, Clock, StackError, Workers, environment
from benchmarks.speed_report import BUSY, DEFAULT, ESTIMATE, WALL, Results, figures, floor_us, report, targets
from benchmarks.speed_rows import ROWS, Contestant, contestant, grid, rows, same_shape, standing, unsloth
from benchmarks.speed_worker import Gpu, is_out_of_memory, turns
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            MATRIX,
            [
                "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT",
                "sm90_xmma_gemm_f16f16_f16f32_f32_nn_n_tilesize128x128x64_warpgroupsize1x1x1",
                "void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_f16_128x128_32x5_nt_align8>(Params)",
                "ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn",
                "fmha_cutlassF_f16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>)",
                "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>",
                "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128",
                "void gemv2T_kernel_val<int, int, __half, __half, __half, float, 128, 16, 4, 4, false>",
                "triton_tem_fused_mm_3",
                "_cce_backward_kernel",
            ],
        ),
        (
            OTHER,
            [
                "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>>",
                "void kDequantizeBlockwise<__half, 512, 64, 8, 2>(float*, unsigned char*, float*, __half*, int, int)",
                "triton_poi_fused__scaled_dot_product_flash_attention_mul_silu_4",
                "triton_red_fused__to_copy_mm_mean_pow_rsqrt_0",
                "void cublasLt::splitKreduce_kernel<32, 16, int, float, __half, float>",
                "void pytorch_flash::flash_bwd_dot_do_o_kernel<true>",
                "_rms_layernorm_forward",
            ],
        ),
        (LINK, ["Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pageable)", "Unified Memory Memcpy HtoD"]),
        (WITHIN, ["Memcpy DtoD (Device -> Device)", "Memset (Device)"]),
    ],
)
def test_kernels_are_told_apart_by_name(kind, names):
    assert {name: kind_of(name) for name in names} == dict.fromkeys(names, kind)


def test_a_union_counts_no_moment_twice():
    assert union_ns([]) == 0
    assert union_ns([(0, 10), (5, 10)]) == 15  # overlapping streams
    assert union_ns([(20, 5), (0, 10), (2, 3)]) == 15  # one within another, and a gap
    assert union_ns([(0, 10), (10, 10)]) == 20


def test_busy_time_leaves_copies_out():
    found = summary(
        [
            Event("nvjet_a", 0, 4_000_000),
            Event("elementwise", 2_000_000, 4_000_000),
            Event("Memcpy HtoD (Pinned -> Device)", 6_000_000, 9_000_000),
            Event("Memcpy DtoD (Device -> Device)", 20_000_000, 1_000_000),
        ]
    )
    assert found["busy_s"] == 0.006
    assert found["active_s"] == 0.007
    assert [found[f"{kind}_s"] for kind in ("matrix", "other", "within", "link")] == [0.004, 0.004, 0.001, 0.009]
    assert found["top"][0] == ["Memcpy HtoD (Pinned -> Device)", LINK, 9.0, 1]
    assert t4_seconds(found, Ratios(matrix=30, bandwidth=15, link=4)) == pytest.approx(0.12 + 0.075 + 0.036)


def test_a_step_adds_up_the_medians_of_its_micro_batches():
    # the last micro-batch of two has the optimizer; one of the first waited for something
    assert speed_report.step_seconds([1.0, 3.0, 9.0, 3.2, 1.1, 3.1], 2) == pytest.approx(1.1 + 3.1)
    assert speed_report.step_seconds([2.0, 2.2, 2.1], 1) == 2.1


def test_figures_are_for_a_token():
    profile = {"steps": 2, "busy_s": 0.4, "matrix_s": 0.2, "other_s": 0.2, "within_s": 0.0, "link_s": 0.0}
    block = {
        "micro": 2,
        "accumulation": 4,
        "micro_s": [0.1] * 8,
        "step_s": [0.4] * 2,
        "profile": profile,
        "reserved_gib": 6.5,
    }
    found = figures([block, {**block, "reserved_gib": 7.0}], 500, Ratios(30, 10, 4))
    assert found["micro_batches"] == 16
    assert found[WALL] == pytest.approx(0.4 / 4000 * 1e6)
    assert found[BUSY] == pytest.approx(0.2 / 4000 * 1e6)
    assert found[ESTIMATE] == pytest.approx((0.1 * 30 + 0.1 * 10) / 4000 * 1e6)
    assert found["reserved_gib"] == 7.0
    assert found["nvml_gib"] is None
    split = figures([{**block, "micro_s": [0.1] * 6, "step_s": [0.3, 0.3]}], 500, None)  # three where four were said
    assert split[WALL] == pytest.approx(0.3 / 4000 * 1e6)


def test_the_floor_is_the_one_that_the_prototype_was_held_against():
    assert floor_us(ROWS["8b-2x2048"], 790) * 4096 == pytest.approx(0.166e6, rel=0.01)  # FLOPs: 131e12


def test_contestants_read_as_they_are_written():
    one = contestant("llamanb:micro=2,stored=20")
    assert (one.stack, one.micro, one.label) == ("llamanb", 2, "llamanb:micro=2,stored=20")
    assert contestant("llamanb:micro=plan").micro is None
    assert contestant(unsloth(4, "off").label) == unsloth(4, "off")
    for wrong in ("axolotl", "trl:micro", "llamanb:stored="):
        with pytest.raises(ValueError, match="no contestant"):
            contestant(wrong)


def test_rows_are_found_by_their_beginnings():
    assert [row.id for row in rows("8b-2x,16gb-512")] == ["8b-2x2048", "16gb-512"]
    assert [row.length for row in rows("16gb")] == [2048, 1024, 512, 4096]
    assert len(rows("all")) == 12
    with pytest.raises(ValueError, match="no row"):
        rows("24gb")


def test_the_grid_is_the_committed_one():
    whole = [(one.micro, one.mode) for one in grid(ROWS["16gb-512"])]
    assert whole == list(itertools.chain(*([(n, mode) for n in (1, 2, 4, 8, 16)] for mode in ("unsloth", "on", "off"))))
    assert max(one.micro for one in grid(ROWS["16gb-4096"])) == 8
    assert [one.micro for one in grid(ROWS["8b-4x512"])] == [4, 4, 4]
    assert [one.label for one in standing(ROWS["16gb-512"])] == ["llamanb", DEFAULT, "trl"]
    assert same_shape(ROWS["1b-4x512"], unsloth(4, "on"))
    assert not same_shape(ROWS["1b-4x512"], unsloth(8, "on"))


def test_processes_of_peers_keep_their_own_allocator(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = environment("/tmp/unsloth")
    assert "PYTORCH_ALLOC_CONF" not in found
    assert found["PYTHONPATH"].startswith("/tmp/unsloth:")
    assert "/elsewhere" not in found["PYTHONPATH"]
    assert environment()["PYTHONPATH"].startswith("/elsewhere:")


class FakeWorker:
    """Answers from a list; an exception in it is raised."""

    def __init__(self, answers):
        self.answers, self.sent, self.session, self.versions, self.ended = answers, [], None, {}, False

    def wait_ready(self, timeout_s):
        return {}

    def send(self, **command):
        self.sent.append(command["do"])

    def answer(self, kind, timeout_s):
        found = self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def end(self):
        self.ended = True


def test_a_session_stays_open_from_turn_to_turn():
    worker = FakeWorker([{"load_s": 1}, {"steps": 3}, {"steps": 3}, {"load_s": 2}, {"steps": 1}])
    workers = Workers(lambda key: worker, Clock(100))
    key = ("trl", "8b", "T4", 0)
    assert workers.turn(key, {"length": 512}, {}) == {"opened": {"load_s": 1}, "steps": 3}
    assert workers.turn(key, {"length": 512}, {})["opened"] is None
    assert workers.turn(key, {"length": 1024}, {})["opened"] == {"load_s": 2}
    assert worker.sent == ["open", "block", "block", "open", "block"]


def test_a_stack_that_never_works_is_given_up():
    made = []

    def start(key):
        made.append(FakeWorker([StackError("no such module", dead=True)]))
        return made[-1]

    workers = Workers(start, Clock(100))
    for _ in range(MOST_FAILURES + 2):
        with pytest.raises(StackError):
            workers.turn(("unsloth", "8b", "", "on"), {}, {})
    assert len(made) == MOST_FAILURES
    assert all(worker.ended for worker in made)


def test_running_out_of_memory_ends_the_process_and_not_the_stack():
    made = []

    def start(key):
        made.append(FakeWorker([StackError("out", out_of_memory=True)] if len(made) < 4 else [{}, {"steps": 1}]))
        return made[-1]

    workers = Workers(start, Clock(100))
    for _ in range(4):
        with pytest.raises(StackError):
            workers.turn(("unsloth", "8b", "", "on"), {}, {})
    assert workers.turn(("unsloth", "8b", "", "on"), {}, {})["steps"] == 1


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("an illegal memory access was encountered"))


@pytest.mark.parametrize(
    "micro_batches",
    [
        lambda turn, control: turn.on_substep_end(None, None, control),
        lambda turn, control: (
            turn.micro_batch_done(),
            turn.micro_batch_done(),
        ),  # llamanb's trainer splits steps itself
    ],
)
def test_turns_measure_when_told_and_hold_training_up_between(micro_batches):
    commands = [
        {"do": "block", "micro_steps": 3, "at_most_s": 9, "profile": 0},
        {"do": "block", "micro_steps": 2, "at_most_s": 9, "profile": 1},
        {"do": "close"},
    ]
    sent = []
    channel = SimpleNamespace(send=lambda **answer: sent.append(answer), receive=lambda: commands.pop(0))
    turn = turns(Gpu("cpu", None), channel, 2, {"micro": 1, "accumulation": 2})
    control = SimpleNamespace(should_training_stop=False)
    turn.on_train_begin(None, None, control)
    steps = 0
    while not control.should_training_stop:
        micro_batches(turn, control)
        turn.on_step_end(None, None, control)
        turn.on_log(None, None, control, logs={"loss": "11.76"})
        steps += 1
    # warm-up 2; three micro-batches are 2 steps of two; 1 untimed, 1 timed, 1 profiled
    assert steps == 2 + 2 + 3
    assert list(sent[0]) == ["opened"]
    blocks = [answer["block"] for answer in sent[1:]]
    assert [block["steps"] for block in blocks] == [2, 1]
    assert [len(block["micro_s"]) for block in blocks] == [4, 2]
    assert [len(block["step_s"]) for block in blocks] == [2, 1]
    assert blocks[1]["profile"]["steps"] == 1
    assert "profile" not in blocks[0]
    assert turn.losses == [11.76] * 3
    assert turn.command == {"do": "close"}


MACHINE = {
    "kind": "machine",
    "gpu": "NVIDIA H200",
    "driver": "580",
    "rates": {"tflops": 720.0, "bandwidth_gbs": 4000.0, "host_link_gbs": 48.0, "launch_us": 6.0},
    "published_gbs": 4800.0,
}


def block(row, label, micro, accumulation, step_s, **opened):
    profile = {"steps": 1, "busy_s": step_s, "matrix_s": step_s, "other_s": 0.0, "within_s": 0.0, "link_s": 0.0}
    return {
        "kind": "block",
        "row": row,
        "contestant": label,
        "micro": micro,
        "accumulation": accumulation,
        "micro_s": [step_s / accumulation] * 2 * accumulation,
        "step_s": [step_s] * 2,
        "profile": profile,
        "opened": {"micro": micro, "accumulation": accumulation, **opened},
    }


def test_verdicts_follow_from_the_times():
    found = [MACHINE]
    for row, best in (("16gb-512", 1.1), ("16gb-1024", 1.0), ("16gb-2048", 1.2), ("16gb-4096", 1.1)):
        found.append(block(row, "llamanb", 1, 8, 1.0, layers={"stored": 32}))
        found.append(block(row, DEFAULT, 2, 4, 1.5))
        found.append(block(row, "unsloth:micro=1,checkpointing=off", 1, 8, best))
        found.append(block(row, "unsloth:micro=1,checkpointing=auto", 1, 8, 0.5))  # not in the committed grid
    verdicts = {text: (said, holds) for text, said, holds in targets(Results(found))}
    held = [holds for text, (_, holds) in verdicts.items() if text.startswith("16 GB")]
    assert held == [True] * 6
    found.append({**block("16gb-512", "llamanb", 1, 8, 1.3)})
    verdicts = {text: (said, holds) for text, said, holds in targets(Results(found))}
    none_slower = next(v for text, v in verdicts.items() if "none slower" in text)
    assert none_slower[1] is False
    text = report(found)
    assert "16gb-512 0.96" in text
    assert "not measured" in text
    assert "| 16gb-4096 | busy time | 1.50 | 1.10 (micro=1,checkpointing=off) | 0.50 |  |" in text


def test_a_target_with_rows_missing_stays_open_unless_it_fails_already():
    found = [MACHINE, block("16gb-512", "llamanb", 1, 8, 1.0), block("16gb-512", DEFAULT, 2, 4, 1.5)]
    (_, said, holds), *_ = targets(Results(found))
    assert "1 of 4 rows" in said
    assert holds is None
    found[1] = block("16gb-512", "llamanb", 1, 8, 2.0)
    assert targets(Results(found))[2][2] is False


def test_uncapped_rows_are_compared_with_the_same_micro_batch():
    found = [
        MACHINE,
        block("1b-4x512", "llamanb", 4, 2, 1.0),
        block("1b-4x512", "llamanb:micro=plan", 8, 1, 0.8),
        block("1b-4x512", "unsloth:micro=4,checkpointing=off", 4, 2, 1.1),
        block("1b-4x512", "unsloth:micro=8,checkpointing=off", 8, 1, 0.9),
        block("8b-2x2048", "llamanb", 2, 4, 0.8, layers={"stored": 32}),
    ]
    verdicts = {text: said for text, said, _ in targets(Results(found))}
    assert "1b-4x512 1.10" in next(said for text, said in verdicts.items() if text.startswith("uncapped"))
    each = [said for text, said in verdicts.items() if text.startswith("1B")]
    assert [said.split(" (")[0] for said in each] == ["1b-4x512 1.38", "1b-4x512 1.12"]
    floor = next(said for text, said in verdicts.items() if text.startswith("8B at 2×2048"))
    assert floor.startswith("1.10 at the measured 720 TFLOP/s, 1.21 at the 790")


def test_what_went_wrong_is_in_the_report(tmp_path):
    found = [
        {"kind": "failed", "row": "16gb-4096", "contestant": "trl", "stage": "round 1", "why": "out of memory"},
        {"kind": "missing", "row": "3b-4x512", "contestant": "", "stage": "row", "why": speed.OVER},
        {
            "kind": "screen",
            "row": "16gb-512",
            "contestant": unsloth(16, "off").label,
            "status": "skipped",
            "why": "too big",
        },
    ]
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in found))
    text = report(speed_report.lines(path))
    assert "failed: 16gb-4096 trl, round 1: out of memory" in text
    assert "missing: 3b-4x512" in text
    assert "skipped: too big" in text


def run_of(row: str, tmp_path, **arguments) -> speed.Run:
    usual = {"screens": [], "only": [], "add": [], "seconds": 100, "rounds": 2, "no_screen": False, "device": "cpu"}
    given = SimpleNamespace(rows=[ROWS[row]], out=tmp_path / "out.jsonl", **(usual | arguments))
    run = speed.Run(given, Clock(100))
    run.machine = MACHINE
    return run


@pytest.mark.parametrize(
    ("only", "stacks"), [(["llamanb", "unsloth"], {"llamanb", "unsloth"}), (["llamanb"], {"llamanb"})]
)
def test_a_peer_takes_part_whose_grid_an_earlier_run_has_looked_through(only, stacks, tmp_path):
    """It needs a checkpoint then too."""
    run = run_of("8b-2x2048", tmp_path, only=only, screens=[ROOT / "benchmarks/results/raw/speed_uncapped.jsonl"])
    assert run.to_screen(ROWS["8b-2x2048"]) == []
    assert run.stacks == stacks
    run.end()


def test_the_best_settings_of_the_grid_are_timed_again(tmp_path):
    run = run_of("16gb-512", tmp_path, add=[Contestant("llamanb", {"stored": "0"})])
    row = ROWS["16gb-512"]

    def screen(one, matrix_s, other_s):
        profile = {"steps": 1, "busy_s": matrix_s + other_s, "matrix_s": matrix_s, "other_s": other_s}
        profile |= {"within_s": 0.0, "link_s": 0.0}
        line = block(row.id, one.label, one.micro, 1, 1.0)
        return {**line, "kind": "screen", "profile": profile}

    run.screens = [
        screen(unsloth(4, "on"), 0.9, 0.2),
        screen(unsloth(4, "off"), 1.04, 0.0),  # less busy, and slower on a T4, where products cost more
        screen(unsloth(4, "unsloth"), 1.2, 0.2),
        {"kind": "screen", "row": row.id, "contestant": unsloth(8, "off").label, "status": "out of memory"},
    ]
    assert [one.label for one in run.best(row)] == [unsloth(4, "off").label, unsloth(4, "on").label]
    assert [one.label for one in run.entrants(row)] == ["llamanb", DEFAULT, "trl", "llamanb:stored=0"]
    placed = run.placed(run.entrants(row))
    assert [run.key(row, one, place) for place, one in placed if one.stack == "llamanb"] == [
        ("llamanb", "8b", "T4", 0),
        ("llamanb", "8b", "T4", 1),
    ]
    assert unsloth(4, "on").label not in [one.label for one in run.to_screen(row)]
    assert len(run.to_screen(row)) == 15 - 4
    run.end()


def test_the_report_reads_what_was_measured():
    raw = ROOT / "benchmarks/results/raw/speed_16gb.jsonl"
    text = report(speed_report.lines(raw))
    assert all(f"16gb-{length}" in text for length in (512, 1024, 4096))
