"""1B's shape made smaller on a pretend T4, and the layer-pruned one trained as planned (benchmarks/shrink.py).

python -m pytest tests/gpu/test_shrink_gpu.py -s      # -s: prints seconds and peaks
"""

import json

import pytest

from benchmarks import shrink as bench
from llamanb.shrink import try_two_of_four

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
T4_GIB = 14.40


@pytest.mark.timeout(1800)
def test_each_way_fits_a_card_of_16_gb_and_what_is_left_trains_as_planned(tmp_path):
    bench.gpu("1b", tmp_path, [])
    found = {line.pop("case"): line for line in map(json.loads, (tmp_path / "1b.jsonl").read_text().splitlines())}
    assert found.keys() == {*bench.CASES, "train"}
    assert not [case for case, line in found.items() if "failed" in line], found
    assert all(found[case]["reserved_gib"] < T4_GIB for case in bench.CASES)
    assert abs(found["train"]["off"]["allocated"]) < 0.02
    bench.report(tmp_path)


def test_a_kernel_for_2_4_is_tried():
    said = try_two_of_four()
    print(said)
    assert "no GPU" not in said
    assert "times as fast" in said or "no kernel runs on this card" in said
