"""Notebook 02 without a GPU, a network and torch: its figures against a count of their own, and hostile rows."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import papermill
import pytest

from llamanb import tiny
from llamanb.data.formats import FORMATS
from llamanb.setup.loaded import SETUP_CELL
from tests.notebooks.shown import cell, noise, text

ROOT = Path(__file__).parents[2]
LIMIT, MICRO, STEP = 256, 4, 16
READ = ("chat", "sharegpt", "alpaca", "seed-tasks", "pairs", "squad", "text")


def page(notebook, cell_id: str) -> str:
    (output,) = cell(notebook, cell_id).outputs
    return output.data["text/html"]


def count_packed(lengths: list[int], limit: int) -> int:
    """Micro-batches of rows of similar length, as many as fit when each counts as the longest."""
    left, count = sorted(lengths), 0
    while left:
        del left[-max(1, limit // left[-1]) :]
        count += 1
    return count


@pytest.fixture(autouse=True)
def a_bare_machine(monkeypatch):
    """No GPU, no network."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there


def test_what_the_default_shows_is_what_is_counted_here(run_notebook, tmp_path):
    from tokenizers import Tokenizer

    notebook = run_notebook("02_data")
    assert noise(notebook) == []
    assert cell(notebook, "setup").source == SETUP_CELL
    assert cell(notebook, "setup").outputs == []

    # Every format that is known is read
    named = [text(notebook, name).splitlines()[0].split(": ")[1] for name in READ]
    assert sorted(named) == sorted(form.name for form in FORMATS)
    assert all("Oslo" in text(notebook, name) for name in READ)
    assert "unanswerable" in text(notebook, "squad")
    assert "row 1, instance 2" in text(notebook, "seed-tasks")

    # The rows, written down by hand in Llama 3's format and cut into tokens by the tokenizer alone
    tokenizer = Tokenizer.from_file(str(tiny.CHECKPOINT / "tokenizer.json"))
    talks = [json.loads(line)["messages"] for line in (tmp_path / "runs/data/talks.jsonl").read_text().splitlines()]
    turn = "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
    pages = ["<|begin_of_text|>" + "".join(turn.format(**message) for message in talk) for talk in talks]
    lengths = [len(tokenizer.encode(words, add_special_tokens=False).ids) for words in pages]
    answers = [
        message["content"] + "<|eot_id|>" for talk in talks for message in talk if message["role"] == "assistant"
    ]
    learned = sum(len(tokenizer.encode(answer, add_special_tokens=False).ids) for answer in answers)
    assert re.search(rf"tokens learned +{learned:,} of {sum(lengths):,}\n", text(notebook, "load"))
    assert text(notebook, "template").strip() == pages[0]

    # The mask: what stands between « and » are the answers, each with its end
    legend, shown = text(notebook, "mask").split("\n", 1)
    said = [turn["content"] + "<|eot_id|>" for turn in talks[0] if turn["role"] == "assistant"]
    assert re.findall("«([^»]*)»", shown) == [words.replace(" ", "·") for words in said]
    in_row = sum(len(tokenizer.encode(words, add_special_tokens=False).ids) for words in said)
    assert legend.startswith(f"{in_row} of {lengths[0]} tokens are learned")
    assert page(notebook, "mask").count("<u ") > 7

    # Lengths
    over = sum(length > LIMIT for length in lengths)
    assert over > 0
    middle = sorted(lengths)[len(lengths) // 2]
    words = f"{len(lengths):,} rows of {min(lengths)} to {max(lengths)} tokens, the middle one {middle}; "
    assert text(notebook, "lengths") == words + f"{over} over max_length = {LIMIT}"
    assert "image/png" in cell(notebook, "lengths").outputs[0].data

    # Padding and packing
    within = [length for length in lengths if length <= LIMIT]
    order = random.Random(0).sample(within, len(within))
    padded = sum(max(order[i : i + MICRO]) * len(order[i : i + MICRO]) for i in range(0, len(order), MICRO))
    real = sum(within)
    rows = {
        re.split(r"\s{2,}", line)[0]: re.split(r"\s{2,}", line)[1:] for line in text(notebook, "packing").splitlines()
    }
    packed = sum(count_packed(order[i : i + STEP], MICRO * max(within)) for i in range(0, len(order), STEP))
    assert rows["computed in"] == [f"{-(-len(order) // MICRO):,} micro-batches", f"{packed:,} micro-batches"]
    assert rows["tokens computed"] == [f"{padded:,}", f"{real:,}"]
    assert rows["of them padding"] == [f"{padded - real:,} ({1 - real / padded:.0%})", "0 (0%)"]
    assert rows[f"a step of {STEP} rows, tokens"] == [f"{n / len(within) * STEP:,.0f}" for n in (padded, real)]

    # What goes wrong
    assert "row 2 (line 3), column 'completion': is empty" in text(notebook, "bad-row")
    said = text(notebook, "long-rows")
    assert f"stop: runs/data/talks.jsonl: {over} rows cannot be trained on" in said
    assert f"max_length = {max(lengths)} takes them all" in said
    assert f"skip: {len(within)} rows to train on, {over} left out" in said
    assert f"truncate: {len(lengths)} rows to train on, 0 left out" in said
    cut = text(notebook, "cut")
    assert f" of {LIMIT} tokens are learned" in cut
    assert not cut.endswith("<|eot_id|>»")


HOSTILE = "<script>alert(1)</script> $x$ \\(y\\) ' onload='z \x00\x1b[31m\u202e /etc/<b>.jsonl"


def test_hostile_rows_of_ones_own_show_as_text(run_notebook, tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"{HOSTILE} {i}", "completion": f"{HOSTILE} so {i}"} for i in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    notebook = run_notebook("02_data", dataset=str(path), row=3, max_length=1024)
    for name in ("mask", "cut"):
        shown = page(notebook, name)
        assert {*re.findall(r"</?(\w+)", shown)} == {"div", "span", "u"}
        assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e$]", shown.replace("<span>$</span>", ""))
        assert "\\(" not in shown
    for name in ("template", "mask", "cut"):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", text(notebook, name)), name
    assert "so·3<|eot_id|>»" in text(notebook, "mask")
    assert "9 rows of " in text(notebook, "lengths")
    assert text(notebook, "lengths").endswith("; 0 over max_length = 1,024")
    assert "stop: 9 rows to train on, 0 left out" in text(notebook, "long-rows")
    assert noise(notebook) == []


def test_the_rows_that_come_with_the_tiny_llama(run_notebook):
    notebook = run_notebook("02_data", dataset="tiny", max_length=128, loss_on="everything", row=1)
    said = text(notebook, "packing")
    assert re.search(r"computed in +[\d,]+ micro-batches +[\d,]+ micro-batches", said)
    learned, tokens = map(int, re.match(r"(\d+) of (\d+) tokens are learned", text(notebook, "mask")).groups())
    assert learned == tokens - 1


def test_a_bad_row_of_ones_own_stops_it_with_its_place(run_notebook, tmp_path):
    (tmp_path / "mine.csv").write_text("prompt,completion\na,b\nc,\n")
    with pytest.raises(papermill.PapermillExecutionError, match=r"row 2 \(line 3\), column 'completion': is empty"):
        run_notebook("02_data", dataset="mine.csv")


def test_nothing_in_it_imports_torch(tmp_path):
    cells = json.loads((ROOT / "notebooks" / "02_data.ipynb").read_text())["cells"]
    code = {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}
    code.pop("setup")  # the ! of a notebook is not Python, and where llamanb is installed it does nothing
    program = "\n".join([*code.values(), "import sys; print('torch' in sys.modules)"])
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
