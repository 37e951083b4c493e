"""The grids that `benchmarks.memory` measures: drawn by seed, written down before they are measured."""

import json
from pathlib import Path

from benchmarks.memory import grid

GRIDS = Path(__file__).parents[2] / "benchmarks/grids"


def test_a_grid_is_what_its_seed_draws_with_the_predictions_of_the_code_as_it_is():
    written = [json.loads(line) for line in (GRIDS / "memory_5.jsonl").read_text().splitlines()]
    assert grid(5, len(written), fused=True) == written
