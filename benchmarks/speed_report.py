"""What `benchmarks.speed` measured, per real token, and which of the targets hold: Markdown from its JSON lines."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.speed_kernels import Ratios, t4_ratios, t4_seconds
from benchmarks.speed_rows import (
    DRY,
    MODELS,
    NOTEBOOK_ROWS,
    RANK,
    ROWS,
    Contestant,
    Row,
    contestant,
    same_shape,
    unsloth,
)
from llamanb.architecture import architecture
from llamanb.card import Card
from llamanb.recipe import LINEAR_LAYERS

T4_LINK_GBS = 12.0
LONG_RATE = 790.0
"""TFLOP/s of the floor that the prototype's 1.63 was taken against (products of bf16 matrices on an H200)."""
WALL, BUSY, ESTIMATE = "wall_us", "busy_us", "t4_us"
WORDS = {WALL: "wall time", BUSY: "busy time", ESTIMATE: "the T4 estimate"}
DEFAULT = unsloth(NOTEBOOK_ROWS, "unsloth").label


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def ratios(machine: dict) -> Ratios | None:
    """How a T4 compares with the GPU that ran; None where that has not been measured."""
    if not machine.get("rates"):
        return None
    t4 = Card.known("T4")
    return t4_ratios(
        machine["rates"],
        published_gbs=machine["published_gbs"],
        t4_tflops=t4.tflops,
        t4_gbs=t4.bandwidth_gbs,
        t4_link_gbs=T4_LINK_GBS,
    )


def step_seconds(micro_s: list[float], accumulation: int) -> float:
    """An optimizer step: the median of each of its micro-batches, added up. The first waits for the next rows, the last
    has the optimizer. Not for rows of uneven length."""
    return sum(statistics.median(micro_s[place::accumulation]) for place in range(accumulation))


def figures(found: list[dict], length: int, scale: Ratios | None) -> dict:
    """Microseconds per real token and GiB, from the blocks (or the look through the grid) of one contestant on one
    row. Where rows are of uneven length, and each step another, a step is the mean of those timed."""
    accumulation, micro = found[0]["accumulation"], found[0]["micro"]
    tokens = accumulation * micro * length
    micro_s = [s for line in found for s in line["micro_s"]]
    profiles = [line["profile"] for line in found if line.get("profile")]
    profiled = tokens * sum(p["steps"] for p in profiles)
    if "tokens" in found[0] and found[0].get("kind") != "screen":  # grids are looked through on rows of one length
        steps = [s for line in found for s in line["step_s"]]
        step_s, tokens = statistics.mean(steps), sum(line["tokens"] for line in found) / len(steps)
        profiled = sum(p["tokens"] for p in profiles)
    elif all(len(line["micro_s"]) == len(line["step_s"]) * accumulation for line in found):
        step_s = step_seconds(micro_s, accumulation)
    else:  # a stack that splits its steps otherwise than it says
        step_s = statistics.median(s for line in found for s in line["step_s"])
    result = {
        "micro": micro,
        "accumulation": accumulation,
        "micro_batches": len(micro_s),
        WALL: step_s / tokens * 1e6,
        BUSY: None,
        ESTIMATE: None,
    }
    for name in ("allocated_gib", "reserved_gib", "nvml_gib"):
        result[name] = max((line[name] for line in found if line.get(name)), default=None)
    if profiles:
        result[BUSY] = sum(p["busy_s"] for p in profiles) / profiled * 1e6
        if scale:
            result[ESTIMATE] = sum(t4_seconds(p, scale) for p in profiles) / profiled * 1e6
    return result


def measures(row: Row, scale: Ratios | None) -> list[Callable[[dict], float]]:
    """What a row's best setting is chosen by: busy time and the estimate on a pretended card, wall time else."""

    def by(name: str) -> Callable[[dict], float]:
        return lambda line: figures([line], row.length, scale)[name] or math.inf

    return [by(BUSY), *([by(ESTIMATE)] if scale else [])] if row.card else [by(WALL)]


def floor_flops(model: str, length: int) -> float:
    """Floating-point operations of a token that cannot be avoided, on average: each product once forward and once for
    the gradient of what went in, the adapters' own gradients, and attention's two products forward and four backward
    over half of all scores. Nothing is computed again."""
    shape = architecture(MODELS.get(model, "tiny"))
    adapters = sum(sum(shape.linear(name)) for name in LINEAR_LAYERS) * RANK
    products = 4 * (shape.layers * (shape.layer_linear_parameters + adapters) + shape.hidden * shape.vocabulary)
    attention = shape.layers * 6 * 2 * shape.q * length / 2
    return products + shape.layers * 2 * adapters + attention


def floor_us(row: Row, tflops: float) -> float:
    """Microseconds of a token at that rate, were its arithmetic all there is."""
    return floor_flops(row.model, row.length) / (tflops * 1e6)


def one_line(line: dict) -> str:
    """A result as it is printed while the run goes on."""
    text = f"{line['at_s']:6.0f} s  {line['kind']:<8}{line.get('row', '')} {line.get('contestant', '')}"
    if "micro_s" in line:
        row = (ROWS | DRY)[line["row"]]
        found = figures([line], row.length, None)
        text += f"  {found['micro']}x{found['accumulation']}  wall {found[WALL]:.2f} us/token"
        text += f"  busy {found[BUSY]:.2f}" if found[BUSY] else ""
        text += f"  {found['allocated_gib']} / {found['reserved_gib']} GiB  turn {line['turn_s']:.0f} s"
        opened = line.get("opened") or {}
        text += "".join(f"  {k[:-2]} {opened[k]:.0f} s" for k in ("load_s", "first_step_s", "warm_s") if k in opened)
        text += f"  {opened['layers']}" if "layers" in opened else ""
        return text
    words = [str(line[name]) for name in ("stage", "status", "why", "gpu", "rates", "versions") if line.get(name)]
    return f"{text}  {' '.join(words)}"


class Results:
    """A run's lines by row and contestant."""

    def __init__(self, found: Iterable[dict]):
        self.lines = list(found)
        machines = [line for line in self.lines if line["kind"] == "machine"]
        self.machine = machines[-1] if machines else {}
        self.scale = ratios(self.machine)
        self.blocks: dict[str, dict[str, list[dict]]] = {}
        for line in self.of("block"):
            self.blocks.setdefault(line["row"], {}).setdefault(line["contestant"], []).append(line)
        for by_label in self.blocks.values():  # a later run's blocks may be of another plan: the latest plan's count
            for label, these in by_label.items():
                last = (these[-1]["micro"], these[-1]["accumulation"])
                by_label[label] = [line for line in these if (line["micro"], line["accumulation"]) == last]

    def of(self, kind: str) -> list[dict]:
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def rows(self) -> list[Row]:
        return [row for row in (ROWS | DRY).values() if row.id in self.blocks]

    def figures(self, row: Row, label: str) -> dict | None:
        these = self.blocks.get(row.id, {}).get(label)
        return figures(these, row.length, self.scale) if these else None

    def best(
        self, row: Row, measure: str, allowed: Callable[[Contestant], bool] = lambda one: True, stack: str = "unsloth"
    ) -> tuple[str, float] | None:
        """The fastest of a stack's settings that were timed in rounds, without Unsloth's `auto`, which the grid
        lacks."""
        found = [
            (label, self.figures(row, label)[measure])
            for label in self.blocks.get(row.id, {})
            if (one := contestant(label)).stack == stack and one.mode != "auto" and allowed(one)
        ]
        return min((pair for pair in found if pair[1]), key=lambda pair: pair[1], default=None)

    def ratio(self, row: Row, measure: str, label: str | None, ours: str = "llamanb", **how) -> float | None:
        """How many times faster llamanb is than `label`, or than the best of Unsloth or of another `stack`."""
        mine = self.figures(row, ours)
        if label is None:
            found = self.best(row, measure, **how)
            other = found and found[1]
        else:
            other = (self.figures(row, label) or {}).get(measure)
        return other / mine[measure] if mine and mine[measure] and other else None


def mean(values: list[float]) -> float:
    """The geometric one."""
    return math.exp(statistics.mean(map(math.log, values)))


def report(found: list[dict]) -> str:
    results = Results(found)
    parts = [_head(results)]
    parts += [_row(results, row) for row in results.rows]
    parts += [_compared(results), _targets(results), _grids(results), _troubles(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(results: Results) -> str:
    machine, text = results.machine, []
    text.append(f"{machine.get('gpu', 'unknown GPU')}, driver {machine.get('driver') or 'unknown'}.")
    if machine.get("rates"):
        rates = machine["rates"]
        text.append(
            f"Measured in the same run: {rates['tflops']:.0f} TFLOP/s in fp16 products of random matrices, "
            f"{rates['bandwidth_gbs']:.0f} GB/s of its memory, {rates['host_link_gbs']:.1f} GB/s from pinned "
            f"host memory. The T4 estimate takes matrix kernels × {results.scale.matrix:.1f}, other kernels × "
            f"{results.scale.bandwidth:.1f}, copies to and from the host × {results.scale.link:.1f}."
        )
    stacks = {line["stack"]: line["versions"] for line in results.of("stack")}
    for stack, versions in stacks.items():
        text.append(f"\n- {stack}: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return " ".join(text)


def _cell(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _row(results: Results, row: Row) -> str:
    rate = (results.machine.get("rates") or {}).get("tflops")
    floor = floor_us(row, 1.0)
    head = f"### {row.id}: {row.model}, rows of {'up to ' if row.lengths else ''}{row.length} tokens"
    head += f", pretend {row.card}" if row.card else ""
    if rate and not row.lengths:
        head += f"; arithmetic floor {floor / rate:.2f} µs a token ({floor / LONG_RATE:.2f} at {LONG_RATE:.0f} TFLOP/s)"
    names = "contestant, at once, layers, micro-batches timed, wall µs/token, tokens/s, busy µs/token, "
    names += "T4 estimate µs/token, allocated GiB, reserved GiB, NVML GiB, busy / floor, losses"
    table = ["| " + " | ".join(names.split(", ")) + " |", "|" + "---|" * len(names.split(", "))]
    for label, these in results.blocks[row.id].items():
        one = results.figures(row, label)
        opened = next((line["opened"] for line in reversed(these) if line.get("opened")), {})
        layers = ", ".join(f"{count} {kind}" for kind, count in opened.get("layers", {}).items())
        over = one[BUSY] / (floor / rate) if one[BUSY] and rate and not row.lengths else None
        cells = [label, f"{one['micro']} × {one['accumulation']}", layers, one["micro_batches"], _cell(one[WALL])]
        cells += [
            f"{1e6 / one[WALL]:,.0f}",
            _cell(one[BUSY]),
            _cell(one[ESTIMATE], 1),
            *(_cell(one[f"{n}_gib"]) for n in _MEMORY),
            _cell(over),
        ]
        cells.append(", ".join(f"{loss:.2f}" for loss in these[0].get("losses", [])))
        table.append("| " + " | ".join(map(str, cells)) + " |")
    return head + "\n\n" + "\n".join(table)


_MEMORY = ("allocated", "reserved", "nvml")


def _compared(results: Results) -> str:
    """How many times faster llamanb is, row by row."""
    table = ["| row | measure | than Unsloth's default | than its best | than its `auto` | than trl's best |"]
    table.append("|---|---|---|---|---|---|")
    for row in results.rows:
        autos = [label for label in results.blocks[row.id] if "checkpointing=auto" in label]
        for measure in (BUSY, ESTIMATE, WALL):
            best = results.best(row, measure, lambda one, row=row: same_shape(row, one))
            cells = [
                _cell(results.ratio(row, measure, DEFAULT)) if row.micro is None else "",
                _cell(results.ratio(row, measure, best[0])) + f" ({best[0].partition(':')[2]})" if best else "",
                _cell(min((r for label in autos if (r := results.ratio(row, measure, label))), default=None)),
                _cell(results.ratio(row, measure, None, stack="trl")),
            ]
            if any(cells):
                table.append(f"| {row.id} | {WORDS[measure]} | " + " | ".join(cells) + " |")
    return "### llamanb is faster by\n\n" + "\n".join(table) if len(table) > 2 else ""


def targets(results: Results) -> list[tuple[str, str, bool | None]]:
    """(target, what was found, whether it holds; None where too little was measured)."""
    found: list[tuple[str, str, bool | None]] = []
    small = [row for row in ROWS.values() if row.card and not row.lengths]
    for measure in (BUSY, ESTIMATE):
        for label, words, least in ((DEFAULT, "default", 1.25), (None, "best", 1.05)):
            each = {row.id: r for row in small if (r := results.ratio(row, measure, label))}
            text = f"16 GB rows: {least} times faster than Unsloth's {words} in {WORDS[measure]}, geometric mean"
            found.append(_judged(text, each, len(small), mean(list(each.values())) >= least if each else None))
        each = {row.id: r for row in small if (r := results.ratio(row, measure, None))}
        text = f"16 GB rows: none slower than Unsloth's best in {WORDS[measure]}"
        found.append(_judged(text, each, len(small), min(each.values()) >= 1 if each else None))
    whole = [row for row in ROWS.values() if not row.card]
    each = {
        row.id: r
        for row in whole
        if (r := results.ratio(row, WALL, None, allowed=lambda one, row=row: same_shape(row, one)))
    }
    text = "uncapped: wall time no longer than Unsloth's best with the same micro-batch"
    found.append(_judged(text, each, len(whole), min(each.values()) >= 1 if each else None))
    ones = [row for row in whole if row.model == "1b"]
    for words, every in (("with the row's micro-batch", False), ("over the whole grid", True)):
        each = {}
        for row in ones:
            best = results.best(row, WALL, lambda one, row=row, every=every: every or same_shape(row, one))
            ratio = best and results.ratio(row, WALL, best[0], "llamanb:micro=plan")
            each |= {row.id: ratio} if ratio else {}
        text = f"1B, micro-batch left to the planner: 1.2 times faster than Unsloth's best {words}"
        found.append(_judged(text, each, len(ones), min(each.values()) >= 1.2 if each else None))
    found.append(_floor_target(results))
    real = [row for row in ROWS.values() if row.lengths]
    each = {row.id: r for row in real if (r := results.ratio(row, WALL, None, stack="trl"))}
    text = "rows of real lengths, 16 GB, no flash: 2 times the real tokens a second of trl's best padded batches"
    found.append(_judged(text, each, len(real), min(each.values()) >= 2 if each else None))
    return found


def _judged(text: str, each: dict[str, float], wanted: int, holds: bool | None) -> tuple[str, str, bool | None]:
    if not each:
        return text, "not measured", None
    said = ", ".join(f"{row} {ratio:.2f}" for row, ratio in each.items())
    said += f"; geometric mean {mean(list(each.values())):.3f}" if len(each) > 1 else ""
    if len(each) < wanted:
        said += f" ({len(each)} of {wanted} rows measured)"
    return text, said, holds if holds is False or len(each) == wanted else None


def _floor_target(results: Results) -> tuple[str, str, bool | None]:
    row = ROWS["8b-2x2048"]
    text = "8B at 2×2048 without recompute: busy time over the arithmetic floor at most 1.55"
    one = results.figures(row, "llamanb")
    rate = (results.machine.get("rates") or {}).get("tflops")
    if not (one and one[BUSY] and rate):
        return text, "not measured", None
    opened = next((line["opened"] for line in results.blocks[row.id]["llamanb"] if line.get("opened")), {})
    again = {kind: count for kind, count in opened.get("layers", {}).items() if kind != "stored"}
    over, long_over = (one[BUSY] / floor_us(row, tflops) for tflops in (rate, LONG_RATE))
    said = f"{over:.2f} at the measured {rate:.0f} TFLOP/s, "
    said += f"{long_over:.2f} at the {LONG_RATE:.0f} of the prototype's 1.63"
    if again:
        return text, f"{said}; but layers were recomputed: {again}", None
    return text, said, long_over <= 1.55


def _targets(results: Results) -> str:
    table = ["| target | found | holds |", "|---|---|---|"]
    words = {True: "yes", False: "**no**", None: "open"}
    table += [f"| {text} | {said} | {words[holds]} |" for text, said, holds in targets(results)]
    return "### Targets\n\n" + "\n".join(table)


def _grids(results: Results) -> str:
    """What looking through Unsloth's grid found, shorter runs than the tables above."""
    table = ["| row | setting | wall µs/token | busy µs/token | reserved GiB | |", "|---|---|---|---|---|---|"]
    for line in results.of("screen"):
        if "micro_s" in line:
            one = figures([line], (ROWS | DRY)[line["row"]].length, None)
            cells = [_cell(one[WALL]), _cell(one[BUSY]), _cell(one["reserved_gib"]), ""]
        else:
            cells = ["", "", "", f"{line['status']}: {line['why'][:80]}"]
        table.append(f"| {line['row']} | {line['contestant'].partition(':')[2]} | " + " | ".join(cells) + " |")
    return "### Unsloth's grid\n\n" + "\n".join(table) if len(table) > 2 else ""


def _troubles(results: Results) -> str:
    lines_ = [
        f"- {line['kind']}: {line.get('row', '')} {line.get('contestant', '')}, {line.get('stage', '')}: {line['why']}"
        for line in [*results.of("failed"), *results.of("missing")]
    ]
    return "### Failed or missing\n\n" + "\n".join(lines_) if lines_ else ""
