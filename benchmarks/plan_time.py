"""How long a plan takes, each in a fresh process: seconds inside `plan()`, and that torch stays out.

python -m benchmarks.plan_time
"""

import statistics
import subprocess
import sys

from llamanb.html import Table

CODE = """
import sys, time
from llamanb import Recipe, plan
recipe = Recipe(model=sys.argv[1], max_length=int(sys.argv[2]))
begin = time.perf_counter()
made = plan(recipe, sys.argv[3])
seconds = time.perf_counter() - begin
assert "torch" not in sys.modules
print(seconds, made.micro_batch_size, made.recomputed)
"""
CASES = [
    (model, length, card)
    for model in ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct")
    for length in ("512", "2048")
    for card in ("T4", "RTX 4090", "A100 80")
] + [
    ("meta-llama/Llama-3.1-8B-Instruct", "4096", "T4"),  # recomputes, so that streaming is looked at too
    *(("meta-llama/Llama-3.3-70B-Instruct", "1024", card) for card in ("A100 80", "RTX 4090", "T4")),
]
RUNS = 3


def main() -> None:
    rows = []
    for model, length, card in CASES:
        found = []
        for _ in range(RUNS):
            command = [sys.executable, "-c", CODE, model, length, card]
            found.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]))
        rows.append((model, length, card, f"{1000 * statistics.median(found):.0f}"))
    print(Table(["model", "tokens a row", "card", "ms, median of 3"], rows))


if __name__ == "__main__":
    main()
