"""How several processes share a step, what they refuse, and plans for several cards. (Trainings: test_together.py.)"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

from llamanb import Card, Recipe, plan, streaming
from llamanb.architecture import architecture
from llamanb.errors import DiskFullError, GpuError, RecipeError
from llamanb.layout import Plan
from llamanb.memory import _load_peaks
from llamanb.model import quantized
from llamanb.model.quantized import QuantizedLayers
from llamanb.planner import workload_of
from llamanb.ranks import ALONE
from llamanb.scale import lead, peers
from llamanb.scale.launch import _why
from llamanb.scale.launched import LAUNCHER, launched
from llamanb.scale.lead import require_even
from llamanb.scale.peers import Peers, RankEnded, _buckets, require_own_gpus
from llamanb.scale.sharded import Sharing
from llamanb.streaming import NCCL_GIB
from llamanb.tape import streamed_bytes
from llamanb.tiny import DEFAULTS
from llamanb.training.recovery import smaller
from tests.conftest import ROOT

EIGHT = "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("lengths", [[5], [3, 900, 4, 5, 6, 7], [10] * 8, list(range(1, 30))])
def test_each_row_is_one_ranks_and_tokens_are_even(count, lengths):
    shares = [Peers(number, count).share(lengths) for number in range(count)]
    assert sorted(row for share in shares for row in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    tokens = [sum(lengths[row] for row in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_one_that_is_alone_does_all_and_adds_nothing_up():
    total, weights = torch.tensor(2.0), [torch.nn.Parameter(torch.ones(3))]
    assert ALONE.share([7, 8]) == [0, 1]
    assert ALONE.all_of("x") == ["x"]
    assert ALONE.summed(total, weights) is total
    assert weights[0].grad is None


def test_each_rank_draws_numbers_of_its_own_and_the_order_of_rows_stays_alike():
    torch.manual_seed(5)
    drawn = []
    for number, step in ((0, 7), (1, 7), (0, 8), (0, 7)):
        with Peers(number, 2).drawing(1, step):
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[3]
    assert drawn[0] != drawn[1]
    assert drawn[0] != drawn[2]
    assert torch.initial_seed() == 5, "by which samplers shuffle"
    found = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(3))


def test_buckets_are_small_and_of_one_dtype(monkeypatch):
    monkeypatch.setattr(peers, "BUCKET", 10)
    tensors = [torch.zeros(n) for n in (4, 5, 1, 30, 2)] + [torch.zeros(1, dtype=torch.float64)]
    assert [[len(t) for t in bucket] for bucket in _buckets(tensors)] == [[4, 5, 1], [30], [2], [1]]


def test_a_launched_process_sees_its_own_gpu_only(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert launched() == (3, 4)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    launched()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "more processes than cards"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    launched()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launched()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "none was to be used"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() == (0, 1)


def test_each_has_its_gpu_before_anything_can_ask_for_one(tmp_path):
    """torch is imported later than the variable is set: a process keeps the GPUs that it saw first."""
    code = """
import os, sys
from llamanb.scale import lead

class Look:
    def find_spec(self, name, *more):
        if name in ("torch", "transformers", "bitsandbytes", "pynvml"):
            sys.exit(f"{name} comes with {os.environ['CUDA_VISIBLE_DEVICES']}")

assert "torch" not in sys.modules
sys.meta_path.insert(0, Look())
lead.main([sys.argv[1]])
"""
    path = tmp_path / "recipe.json"
    path.write_text(Recipe(**DEFAULTS).to_json())
    launcher = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "5,7"}
    done = subprocess.run([sys.executable, "-c", code, path], env=os.environ | launcher, capture_output=True, text=True)
    assert "comes with 7" in done.stderr, done.stderr


MEETING = """
import os, sys
from llamanb.scale.launched import launched
number, count = launched()
from llamanb.scale.peers import Peers
ranks = Peers(number, count)
ranks.join()
ranks.all_of(None)
if number:
    os._exit(9)
import torch
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
try:
    {"words": lambda: [ranks.told(), ranks.all_of(1)], "sums": lambda: ranks.summed(1, [weight])}[sys.argv[1]]()
except RuntimeError as error:
    print(f"torch's own: {error}")
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["words", "sums"])
def test_the_end_of_another_rank_is_an_error_of_ours(tmp_path, what):
    path = tmp_path / "meeting.py"
    path.write_text(MEETING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    environment = [os.environ | place | {"RANK": str(rank), "PYTHONPATH": str(ROOT)} for rank in range(2)]
    command = [sys.executable, str(path), what]
    other = subprocess.Popen(command, env=environment[1], cwd=tmp_path)
    done = subprocess.run(command, env=environment[0], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert other.wait(60) == 9
    assert "RankEnded: another of the 2 ranks has ended" in done.stdout, done.stdout + done.stderr


def test_each_rank_quantizes_some_layers_and_reads_the_others(capsys, monkeypatch):
    made, written = [], []

    class Cache:
        def __init__(self):
            self.hashes = {}

        def layer(self, number):
            made.append(number)
            self.hashes[number] = f"hash {number}"

        def note(self):
            written.append(dict(self.hashes))

    monkeypatch.setattr("llamanb.model.quantized.EVERY_S", 0)
    monkeypatch.setattr(Peers, "all_of", lambda ranks, mine: [mine, {n: f"hash {n}" for n in range(5)}])
    for rank, own in enumerate(([0, 2, 4], [1, 3])):
        cache = Cache()
        Sharing(Peers(rank, 2)).make_together(cache, 5)
        assert made == own
        assert sorted(cache.hashes) == [0, 1, 2, 3, 4]
        assert len(written) == 1, "rank 0 writes down what all made"
        made.clear()
    assert capsys.readouterr().out.splitlines() == [f"{n} of 5 layers in 4 bits, by 2 ranks" for n in (0, 2, 4)]


def test_ranks_that_quantize_at_once_share_a_disk_and_what_they_note(tmp_path, monkeypatch):
    """Four layers that are to wait on disk, and room for four and a half: the ranks write by turns."""
    names = {number: [f"model.layers.{number}.mlp.up_proj.weight"] for number in range(4)}
    recipe, cpu = Recipe(model=EIGHT), torch.device("cpu")

    def read(name):
        return torch.full((64, 256), float(name.split(".")[2]))

    ranks = [QuantizedLayers(tmp_path, read, names, recipe, torch.bfloat16, cpu, on_disk=range(4)) for _ in range(2)]
    size = len(save(ranks[0].layer(0)))
    room = 4.5 * size + quantized.SPARE_GIB * 2**30

    def usage(folder):
        return SimpleNamespace(free=room - sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")))

    monkeypatch.setattr(quantized.shutil, "disk_usage", usage)
    monkeypatch.setattr(os, "getpid", iter(range(100)).__next__)  # two processes
    for number, rank in enumerate((1, 0, 1), 1):
        ranks[rank].layer(number)
    assert sorted(json.loads((tmp_path / quantized.MANIFEST).read_text())) == sorted(ranks[1].hashes)
    assert len(ranks[1].hashes) == 4
    assert not list(tmp_path.glob(f"{quantized.MANIFEST}.*"))
    room = size  # none for another
    with pytest.raises(DiskFullError, match="1 of them take"):
        QuantizedLayers(tmp_path / "a", read, names, recipe, torch.bfloat16, cpu, on_disk=[0]).layer(0)


def test_an_error_of_this_rank_s_gpu_is_not_another_s_end():
    with pytest.raises(torch.AcceleratorError), Peers(0, 2).meeting():
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RankEnded), Peers(0, 2).meeting():
        raise RuntimeError("Connection closed by peer")


def test_two_ranks_on_one_gpu_are_refused():
    require_own_gpus([("a", "1"), ("a", "2"), ("b", "1")])
    require_own_gpus([None, None])
    with pytest.raises(GpuError, match="ranks 1 and 2 both use one GPU of a"):
        require_own_gpus([("b", "2"), ("a", "2"), ("a", "2")])


def test_what_accelerate_tells_the_trainer_is_not_heard(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for name in ("WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1)
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ


def test_one_process_where_several_were_asked_for_is_refused(monkeypatch):
    """accelerate launch --cpu --num_processes 2 sets an address to meet at, and starts one process."""
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched() == (0, 1), "not accelerate's"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.raises(GpuError, match="one process was launched"):
        launched()


def test_cards_that_are_not_alike_are_refused():
    t4 = Card.known("T4")
    require_even([(t4, "a"), (t4, "b")])
    require_even([(Card("CPU", None), "a")] * 2)
    with pytest.raises(GpuError, match=r"rank 1 on b(.|\n)*RTX 4090"):
        require_even([(t4, "a"), (Card.known("RTX 4090"), "b")])
    with pytest.raises(GpuError, match="rank 2 on a"):
        require_even([(t4, "a"), (t4, "a"), (replace(t4, free_gib=t4.free_gib - 3), "a")])


def test_a_torch_without_nccl_is_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(GpuError, match="without NCCL"):
        Peers(0, 2).join()


@pytest.mark.slow
def test_a_port_in_use_is_one_clear_error(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(Recipe(**DEFAULTS).to_json())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        environment = os.environ | where | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        arguments = [sys.executable, "-m", "llamanb", str(path), "--runs", str(tmp_path)]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1
    assert "rank 0: rank 0 of 2 cannot meet the others" in done.stderr
    assert where["MASTER_PORT"] in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_for_several_cards_is_one_cards_share():
    recipe = Recipe(model=EIGHT, effective_batch_size=16, max_length=1024)
    one, two, three = (plan(recipe, "T4", cards=n) for n in (1, 2, 3))
    assert [made.share for made in (one, two, three)] == [16, 8, 6]
    for made in (one, two, three):
        assert made.micro_batch_size * made.accumulation == made.share
        assert made.recipe == recipe
    assert two.step_s == pytest.approx(one.step_s / 2, rel=0.1)
    assert "on each of 2 cards" in str(two)
    assert Plan.from_json(two.to_json()).cards == 2
    assert one.card.free_gib - two.card.free_gib == pytest.approx(NCCL_GIB)
    less = smaller(two)
    assert less.cards == 2
    assert less.micro_batch_size * less.accumulation == 8


@pytest.mark.parametrize(("machines", "of_all"), [(1, 30.0), (2, 60.0)])
def test_what_is_launched_knows_the_memory_of_its_machine(monkeypatch, machines, of_all):
    """Ranks of one machine share it."""
    made = []
    monkeypatch.setattr(lead, "train", lambda plan, *_, **__: made.append(plan))
    monkeypatch.setattr(lead, "host_memory", lambda: (64.0, 30.0, 40.0))
    monkeypatch.setattr(streaming, "host_memory", lambda: (64.0, 30.0, 40.0))
    recipe = Recipe(**{**DEFAULTS, "effective_batch_size": 4})
    lead._lead(recipe, SimpleNamespace(name="run", runs="runs", resume=False, new=False), Peers(0, 4), machines)
    assert made[0].card.host_gib == of_all / 4
    assert made[0].cards == 4


def test_too_many_cards_and_rows_that_do_not_go_into_a_share():
    with pytest.raises(RecipeError, match="a step has 4 rows"):
        plan(Recipe(model=EIGHT, effective_batch_size=4), "T4", cards=5)
    for cards in (0, -1):
        with pytest.raises(RecipeError, match=f"cards = {cards}") as caught:
            plan(Recipe(model=EIGHT, effective_batch_size=4), "T4", cards=cards)
        assert "1 to 4 cards" in caught.value.fix
    with pytest.raises(RecipeError, match="each of 2 cards computes 4 of a step's 8 rows"):
        plan(Recipe(model=EIGHT, effective_batch_size=8, micro_batch_size=8), "T4", cards=2)


def test_the_reason_is_found_in_what_was_printed():
    torchrun = ["E1121 torch.distributed.elastic failed", "Root Cause", "exitcode: 1"]
    ours = ["step 1", "rank 0: no rows", "  why: empty", "  fix: more", *torchrun]
    assert _why(ours).splitlines() == ours[1:4]
    ended = ["rank 0: another of the 2 ranks has ended", "  why: closed", "  fix: see"]
    assert _why([*ended, "rank 1: ValueError: odd", *torchrun])[:23] == "rank 1: ValueError: odd", (
        "the cause, if any is told"
    )
    assert _why([*ended, *torchrun]).splitlines() == ended
    assert _why(["Traceback", "ValueError: odd", *torchrun]) == "ValueError: odd"
    assert _why(torchrun) == "a rank ended without a word"


def test_a_model_without_room_for_copies_is_shared_and_where_parts_have_none_streamed():
    recipe = Recipe(model="meta-llama/Llama-3.3-70B-Instruct", max_length=2048, effective_batch_size=8)
    four, two, copied = (
        plan(recipe, "RTX 4090", cards=4),
        plan(recipe, "RTX 4090", cards=2),
        plan(recipe, "H200", cards=2),
    )
    assert (four.shards, len(four.streamed), four.fits) == (4, 80, True)
    assert four.streamed_gib == pytest.approx(128256 * 8192 * 2 / 2**30), "the token embedding"
    (shared,) = [line for line in str(four).splitlines() if "shared by 4 cards" in line]
    assert "a copy has no room on each" in shared
    assert four.reasons["weights"].startswith("a copy has no room on each")
    assert (two.shards, two.fits) == (1, True)
    assert two.streamed_gib > 33, "each card's own"
    assert (copied.shards, copied.streamed) == (1, ())
    weights = [made.memory.buckets["weights"] for made in (four, copied)]
    assert weights[0] < weights[1] / 4 + 2 * 2**30
    less = smaller(four)
    assert (less.shards, less.streamed) == (4, four.streamed)
    assert less.needs_gib < four.needs_gib


def test_what_cards_share_takes_a_part_of_each_layer_and_two_whole_ones():
    shape = architecture(EIGHT)
    work = plan(Recipe(model=EIGHT, weights="resident"), "T4", force=True)
    work = workload_of(work, shape).replace(streamed=32)
    of = {shards: _load_peaks(work.replace(shards=shards))["adapters made"]["weights"] for shards in (1, 2, 4)}
    layer = streamed_bytes(work)
    assert of[2] - of[1] == pytest.approx(32 * layer / 2, rel=0.01)
    assert of[4] - of[1] == pytest.approx(32 * layer / 4, rel=0.01)


def test_one_process_that_a_launcher_started_is_alone(monkeypatch):
    """With the launcher's variables the Trainer would wrap the model, for others that are not there."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launched() == (0, 1)
    assert not set(LAUNCHER) & os.environ.keys()
