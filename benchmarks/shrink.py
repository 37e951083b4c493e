"""Making a model smaller: the long grid on the tiny Llama, and what 1B and 8B take on a card of 16 GB.

    python -m benchmarks.shrink tiny OUT            (a CPU will do: under an hour; OUT/tiny.json, shrink.png)
    python -m benchmarks.shrink draws OUT           (of it what needs several draws of the rows: OUT/draws.json)
    python -m benchmarks.shrink gpu 1b|8b FOLDER [CASE ...]    (a GPU; 8b: 60 GB of disk; FOLDER/SIZE.jsonl goes on
                                                                where it was; without cases all of them, then train)
    python -m benchmarks.shrink report FOLDER

`gpu` makes a checkpoint of random weights in the published shape and, each in a process of its own on a pretend T4
(14.40 GiB for torch's allocator), prunes and factors it, reporting seconds, the peak of the allocator and host memory;
then trains the layer-pruned one in nf4 and holds its peaks against the plan. `mini` is a model for trying the script.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from benchmarks.memory import train_and_watch
from llamanb import Card, Recipe, load_data, plan, shrink
from llamanb.card import gpu_in_use
from llamanb.html import Table
from llamanb.layout import GIB
from llamanb.shrink.summary import Row, Shrunken

TENTHS = " ".join(f"0.{n}" for n in range(1, 10))
LONG = (
    f"magnitude {TENTHS}, magnitude-global {TENTHS}, wanda {TENTHS}, magnitude 2:4 0.5, wanda 2:4 0.5, "
    f"layers 0.25 0.5 0.75, channels {TENTHS}, heads 0.5, SVD {TENTHS[4:]}, whitened SVD {TENTHS[4:]}"
)
RECIPE = Recipe(
    model="tiny",
    dataset="chats.jsonl",
    method="lora",
    max_length=256,
    rank=8,
    alpha=16.0,
    learning_rate=5e-3,
    effective_batch_size=16,
    steps=40,
    eval_rows=200,
)
SEEDS = 5
NOISE = 0.01
"""Nats by which a loss may fall from one sparsity to the next and still count as noise."""
SVDS = ("SVD", "whitened SVD")
BUDGETS = (0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)
"""At which these two are compared on every draw, and at half."""
UNEVEN = ", outlier features"
OUTLIERS, LARGER = 16, 32
"""Every so many features, so many times as large."""
STRUCTURED = ("layers", "channels", "heads")
CASES = ["magnitude", "magnitude-global", "wanda", "wanda 2:4", "channels", "heads", "SVD", "whitened SVD", "layers"]
RESULTS, DRAWS, SIZES = "tiny.json", "draws.json", ("1b", "3b", "8b", "mini")
ROWS, LENGTH = 128, 1024
"""Calibration rows and their tokens on a GPU."""


def tiny(out: Path) -> None:
    """The long grid, recovered throughout, and the comparisons that need several draws of the rows."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPE.replace(dataset=str(shrink.write_chats(out / "chats.jsonl", 1600)))
    found = shrink.measure(recipe, load_data(recipe), LONG, folder=out / "variants")
    found.picture().save(out / "shrink.png")
    results = {"rows": [dataclasses.asdict(row) for row in found.rows], "card": found.card}
    (out / RESULTS).write_text(json.dumps(results), encoding="utf-8")
    draw(out)


def draw(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    draws = [compare(seed, out) for seed in range(SEEDS)]
    (out / DRAWS).write_text(json.dumps(draws), encoding="utf-8")
    report(out)


def compare(seed: int, out: Path) -> dict[str, float]:
    """Losses of rival methods at the same size, on calibration and held-out rows of one draw; by method, with the share
    that is kept where that is not half."""
    from llamanb.model import load_model
    from llamanb.quiet import quiet_libraries

    rows = str(shrink.write_chats(out / f"chats-{seed}.jsonl", 1200, seed + 1))
    recipe = RECIPE.replace(dataset=rows, eval_rows=240)
    found, data = {}, load_data(recipe)
    folder, uneven = out / f"seed-{seed}", with_outliers(out / "uneven")
    halves = ("magnitude", "magnitude-global", "wanda", *(f"{m}{UNEVEN}" for m in ("magnitude", "wanda")), *SVDS)
    for method, share in [*((one, 0.5) for one in halves), *itertools.product(SVDS, BUDGETS)]:
        shutil.rmtree(folder, ignore_errors=True)
        base = recipe.replace(model=str(uneven)) if method.endswith(UNEVEN) else recipe
        write(method.removesuffix(UNEVEN), base, data, folder, share)
        with quiet_libraries():
            factored, plain = "SVD" in method, recipe.replace(model=str(folder))
            model = shrink.load_factored(folder) if factored else load_model(plan(plain), data.tokenizer)
            found[drawn(method, share)] = loss_of(model, data)
        shutil.rmtree(folder)
    return found


def drawn(method: str, share: float) -> str:
    return method if share == 0.5 else f"{method} {share:.0%}"


def with_outliers(to: Path) -> Path:
    """The tiny Llama, to the rounding the same function, with a few features that are far larger than the others
    between its norms and its linear layers, and weights that are smaller there: as large Llamas have them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llamanb.tiny import CHECKPOINT

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    for layer in model.model.layers:
        for norm, readers in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            norm.weight.data[::OUTLIERS] *= LARGER
            for reader in readers:
                reader.weight.data[:, ::OUTLIERS] /= LARGER
    shutil.rmtree(to, ignore_errors=True)
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(to)
    return to


def loss_of(model, data) -> float:
    """Nats per trained token of the held-out rows; no answers are generated."""
    import torch

    pad, total, count = torch.nn.utils.rnn.pad_sequence, 0.0, 0
    for first in range(0, len(data.held_out), 32):
        rows = data.held_out[first : first + 32]
        ids = pad([torch.tensor(row.input_ids) for row in rows], batch_first=True)
        labels = pad([torch.tensor(row.labels) for row in rows], batch_first=True, padding_value=-100)[:, 1:]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def write(method: str, recipe: Recipe, data, to: Path, share: float, **options) -> Path:
    if "SVD" in method:
        return shrink.write_factored(recipe, to, budget=share, whiten="white" in method, data=data, **options)
    name, _, pattern = method.partition(" ")
    return shrink.write_pruned(recipe, to, method=name, sparsity=share, pattern=pattern or None, data=data, **options)


def draws_table(draws: list[dict[str, float]]) -> Table:
    halves = [name for name in draws[0] if not name.endswith("%")]
    rows = [[seed, *(f"{one[name]:.4f}" for name in halves)] for seed, one in enumerate(draws)]
    return Table(["draw of the rows", *(f"{name}, half kept: loss" for name in halves)], rows)


def budgets_table(draws: list[dict[str, float]]) -> Table:
    """Nats that whitened SVD loses less, by draw."""
    plain, whitened = SVDS
    shares = sorted({0.5, *BUDGETS})
    rows = [
        [seed, *(f"{one[drawn(plain, share)] - one[drawn(whitened, share)]:+.4f}" for share in shares)]
        for seed, one in enumerate(draws)
    ]
    return Table(["draw of the rows", *(f"{share:.0%} kept" for share in shares)], rows)


def rivals(draws: list[dict[str, float]]) -> Table:
    """What should lose less at the same size, on every draw, and whether it does."""
    pairs = [
        ("wanda", "magnitude", (0.5,)),
        ("wanda", "magnitude-global", (0.5,)),
        (f"wanda{UNEVEN}", f"magnitude{UNEVEN}", (0.5,)),
        (*SVDS[::-1], (0.5,)),
        (*SVDS[::-1], BUDGETS),
    ]
    said = []
    for better, worse, shares in pairs:
        gains = [one[drawn(worse, share)] - one[drawn(better, share)] for one in draws for share in shares]
        words = f"{sum(gain > 0 for gain in gains)} of {len(gains)}; {min(gains):+.4f} to {max(gains):+.4f} nats"
        where = "half kept" if len(shares) == 1 else f"{shares[0]:.0%} to {shares[-1]:.0%} kept"
        said.append([f"{better} beats {worse}, {where}", "yes" if min(gains) > 0 else "no", words])
    return Table(["claim", "holds", "figures"], said)


def claims(found: Shrunken) -> Table:
    """What should hold, and whether it does."""
    rows = found.rows[1:]
    methods: dict[str, list[Row]] = {}
    for row in rows:
        if row.before:
            methods.setdefault(row.method, []).append(row)
    said = []
    for method, own in methods.items():
        falling = sorted(own, key=lambda row: row.share if "SVD" not in method else -row.share)
        losses = [found.rows[0].before.loss, *(row.before.loss for row in falling)]
        steps = [after - before for before, after in itertools.pairwise(losses)]
        said.append(
            [f"{method}: the more goes, the worse", min(steps) > -NOISE, f"smallest step {min(steps):+.4f} nats"]
        )
    for name, chosen in (("structured", STRUCTURED), ("other", set(methods) - set(STRUCTURED))):
        own = [row for row in rows if row.method in chosen and row.after]
        gains = {row.name: row.before.loss - row.after.loss for row in own}
        lossy = [row.name for row in own if row.before.loss - found.rows[0].before.loss > NOISE]
        least, lost = min(lossy, key=gains.get), min(gains, key=gains.get)
        words = f"{sum(gains[one] > 0 for one in lossy)} of {len(lossy)}; least {gains[least]:+.4f} nats, {least}"
        said.append([f"recovery gains on every {name} variant that lost {NOISE} nats", gains[least] > 0, words])
        words = f"most {gains[lost]:+.4f} nats, {lost}"
        said.append([f"recovery costs no {name} variant {NOISE} nats", gains[lost] > -NOISE, words])
    said += [[f"{row.name} was measured", False, row.failed] for row in rows if row.failed]
    return Table(["claim", "holds", "figures"], [[what, "yes" if holds else "no", why] for what, holds, why in said])


def markdown(table: Table) -> str:
    lines = [table.headers, ["---"] * len(table.headers), *table.rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def gpu(size: str, folder: Path, cases: list[str]) -> None:
    """Every case that FOLDER/SIZE.jsonl does not have yet, each in a fresh process; `train` needs `layers` before."""
    folder.mkdir(parents=True, exist_ok=True)
    base, results = folder / size, folder / f"{size}.jsonl"
    if not (base / "tokenizer.json").is_file():
        subprocess.run([sys.executable, "-m", "tests.checkpoints", size, str(base)], check=True)
    done = {json.loads(line)["case"] for line in results.read_text().splitlines()} if results.exists() else set()
    for case in (case for case in cases or [*CASES, "train"] if case not in done):
        command = [sys.executable, "-m", "benchmarks.shrink", "case", size, str(folder), case]
        ran = subprocess.run(command, capture_output=True, text=True)
        said = next((line[7:] for line in ran.stdout.splitlines() if line.startswith("RESULT ")), None)
        line = json.loads(said) if said else {"failed": ran.stderr.strip()[-300:]}
        with results.open("a") as file:
            file.write(json.dumps({"case": case, **line}) + "\n")
        print(case, line, flush=True)
    shutil.rmtree(folder / f"{size}-layers", ignore_errors=True)


def one_case(size: str, folder: Path, case: str) -> dict:
    """Prunes, factors or trains in this process."""
    import torch

    is_there = gpu_in_use(torch)[0] is not None
    card = Card.pretend("T4") if is_there else None
    recipe = Recipe(model=str(folder / size), max_length=LENGTH, effective_batch_size=2, micro_batch_size=1, rank=16)
    kept = folder / f"{size}-layers"
    if case == "train":
        return trained(recipe.replace(model=str(kept)), card)
    to = kept if case == "layers" else folder / "out"
    for path in (kept, folder / "out") if case != "layers" else (kept,):
        shutil.rmtree(path, ignore_errors=True)
    vocabulary = json.loads((folder / size / "config.json").read_text())["vocab_size"]
    numbers = random.Random(0)
    rows = [SimpleNamespace(input_ids=[numbers.randrange(vocabulary) for _ in range(LENGTH)]) for _ in range(ROWS)]
    begin_s = time.monotonic()
    share = 0.25 if case == "layers" and size != "mini" else 0.5
    write(case, recipe, SimpleNamespace(train=rows), to, share, card=card)
    facts = json.loads((to / "shrink.json").read_text())
    if case != "layers":
        shutil.rmtree(to)
    return {
        "device": torch.cuda.get_device_name() if is_there else "CPU",
        "share": share,
        "took_s": round(time.monotonic() - begin_s, 1),
        "peak_gib": facts["peak_gpu_gib"],
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if is_there else None,
        "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "gb": facts["bytes"] / 1e9,
    }


def trained(recipe: Recipe, card: Card | None) -> dict:
    """The peaks of a training against its plan; without a GPU only the plan for a T4."""
    made = plan(recipe, card or "T4", force=True)
    planned = {part: round(size / GIB, 4) for part, size in made.memory.parts.items()}
    planned |= {"allocated": round(made.memory.allocated / GIB, 4), "reserved": round(made.needs_gib, 4)}
    measured = train_and_watch(made, 3)["measured"] if card else {}
    off = {part: round(measured[part] / planned[part] - 1, 4) for part in planned if measured.get(part)}
    return {"planned": planned, "measured": measured, "off": off}


def report(folder: Path) -> None:
    """Everything that a folder has results of, as Markdown."""
    if (folder / RESULTS).exists():
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        found = Shrunken([Row.from_dict(row) for row in results["rows"]], results["card"])
        print("\n\n".join(map(markdown, (found.table(), claims(found)))))
    if (folder / DRAWS).exists():
        draws = json.loads((folder / DRAWS).read_text(encoding="utf-8"))
        print("\n\n".join(map(markdown, (draws_table(draws), budgets_table(draws), rivals(draws)))))
    for results in (path for size in SIZES if (path := folder / f"{size}.jsonl").exists()):
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        names = ("share", "took_s", "peak_gib", "reserved_gib", "host_gib", "gb", "failed")
        shown = [
            [line["case"], *(_short(line.get(name)) for name in names)] for line in lines if line["case"] != "train"
        ]
        print(f"\n{results.stem}\n\n{markdown(Table(['case', *names], shown))}")
        for line in lines:
            if "planned" in line:
                rows = [[p, v, line["measured"].get(p, ""), line["off"].get(p, "")] for p, v in line["planned"].items()]
                print("\n" + markdown(Table(["layer-pruned, trained", "planned GiB", "measured", "off"], rows)))


def _short(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    if sys.argv[1:2] == ["tiny"]:
        tiny(Path(sys.argv[2]).absolute())
    elif sys.argv[1:2] == ["draws"]:
        draw(Path(sys.argv[2]).absolute())
    elif sys.argv[1:2] == ["gpu"]:
        gpu(sys.argv[2], Path(sys.argv[3]).absolute(), sys.argv[4:])
    elif sys.argv[1:2] == ["case"]:
        print("RESULT", json.dumps(one_case(sys.argv[2], Path(sys.argv[3]), sys.argv[4])), flush=True)
    elif sys.argv[1:2] == ["report"]:
        report(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
