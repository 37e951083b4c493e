"""How soon a user hears of bad rows: seconds from process start to the error, each case in a fresh process.

    python -m benchmarks.malformed

The process does what the quickstart does: a recipe, then `load_data`. No model is loaded, nor is torch.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llamanb.html import Table
from tests.malformed import CASES, source

CODE = """
import sys
from llamanb import LlamanbError, Recipe, load_data
try:
    load_data(Recipe(dataset=sys.argv[1]))
except LlamanbError as error:
    assert "torch" not in sys.modules
    print(error)
    sys.exit(9)
"""


def main() -> None:
    rows = []
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            dataset = source(case, Path(folder))
            begin = time.monotonic()
            result = subprocess.run([sys.executable, "-c", CODE, dataset], capture_output=True, text=True, env=env)
            seconds = time.monotonic() - begin
        assert result.returncode == 9, f"{case}: {result.stdout}{result.stderr}"
        rows.append((case, f"{seconds:.2f}", result.stdout.splitlines()[0].replace(folder, "…")))
    print(Table(["case", "seconds", "error"], rows))
    print(f"{len(rows)} cases, slowest {max(float(row[1]) for row in rows):.2f} s")


if __name__ == "__main__":
    main()
