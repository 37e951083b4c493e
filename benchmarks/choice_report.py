"""What `benchmarks.choice` timed, as Markdown: each choice against the fastest layout that was enumerated."""

from __future__ import annotations

import math
import statistics

from benchmarks.choice_bench import RAN_OUT, TIMED
from benchmarks.speed_rows import EFFECTIVE

WITHIN = 1.03
"""Times the fastest, that a choice may take in the row in which it is not itself the fastest."""
MEMORY = ("allocated", "reserved")
"""Of each layout timed: predicted, and torch's peaks."""
HEAD = "row, fastest enumerated, s, GiB, chosen by, choice, s, GiB, may use GiB, times the fastest, "
HEAD += "times the fastest that a plan may use, noise, timed, out of memory, not run"


def label(line: dict) -> str:
    return f"{line['micro']} × {EFFECTIVE // line['micro']}: " + ", ".join(f"{n} {kind}" for kind, n in line["layers"])


def verdict(found: list[dict]) -> dict:
    """What a row's lines come to: the fastest of the layouts enumerated, the noise, and each choice against them."""
    *layouts, row = found
    finals = [line for line in layouts if line.get("final_s") and None not in line["final_s"]]
    step_s = {label(line): min(line["final_s"]) for line in finals}
    apart = [sorted(line["final_s"])[1] / min(line["final_s"]) - 1 for line in finals]
    enumerated = sorted((line for line in finals if line["enumerated"]), key=lambda line: step_s[label(line)])
    limit_gib = row["limit_gib"] or math.inf
    allowed = [line for line in enumerated if (line["reserved_gib"] or 0) <= limit_gib]
    best, *within = [step_s[label(line)] for line in (enumerated[0], *allowed[:1])]
    choices = {}
    for line in layouts:
        for name in line["chosen_by"]:
            took_s = step_s.get(label(line))
            ratios = [(took_s or math.inf) / other for other in (best, *within)]
            choices[name] = {"line": line, "step_s": took_s, "ratio": ratios[0], "allowed": ratios[-1]}
    return {"best": enumerated[0], "best_s": best, "noise": statistics.median(apart), "choices": choices}


def report(found: list[dict]) -> str:
    by_row: dict[str, list[dict]] = {}
    for line in found:
        if line["kind"] != "rehearsed":
            by_row.setdefault(line["row"], []).append(line)
    table = ["| " + " | ".join(HEAD.split(", ")) + " |", "|" + "---|" * len(HEAD.split(", "))]
    ratios: dict[str, list[tuple[float, float, float]]] = {}
    for row, some in by_row.items():
        what, facts = verdict(some), some[-1]
        statuses = [line["status"] for line in some[:-1] if line["enumerated"]]
        counts = [statuses.count(TIMED), statuses.count(RAN_OUT)]
        for name, one in sorted(what["choices"].items()):
            ratios.setdefault(name, []).append((one["ratio"], one["allowed"], what["noise"]))
            cells = [row, label(what["best"]), f"{what['best_s']:.4f}", _gib(what["best"].get("reserved_gib")), name]
            cells += [label(one["line"]), f"{one['step_s']:.4f}" if one["step_s"] else RAN_OUT]
            cells += [_gib(one["line"].get("reserved_gib")), _gib(facts["limit_gib"]), f"{one['ratio']:.3f}"]
            cells += [f"{one['allowed']:.3f}", f"{what['noise']:.1%}", *counts, len(statuses) - sum(counts)]
            table.append("| " + " | ".join(map(str, cells)) + " |")
    stacks = sorted({f"{some[-1]['gpu']}, torch {some[-1]['torch']}" for some in by_row.values()})
    counts = [_count(name, each) for name, each in sorted(ratios.items())]
    return "\n\n".join(["; ".join(stacks), "\n".join(table), *counts, *_memory(found)]) + "\n"


def _memory(found: list[dict]) -> list[str]:
    """How far predictions were off, where lines hold them."""
    said = []
    for name in MEMORY:
        both = [(line.get(f"predicted_{name}_gib"), line.get(f"{name}_gib")) for line in found]
        errors = [predicted / seen - 1 for predicted, seen in both if predicted and seen]
        if errors:
            mean, worst = statistics.mean(map(abs, errors)), max(errors, key=abs)
            said.append(f"Memory {name} by {len(errors)} layouts: {mean:.2%} off on average, {worst:+.2%} at worst.")
    return said


def _count(name: str, each: list[tuple[float, float, float]]) -> str:
    """What the rows come to, against all layouts and against those that a plan may use."""
    said = []
    for words, at in (("of all layouts", 0), ("of those that a plan may use", 1)):
        fastest = sum(one[at] <= 1 + one[2] for one in each)
        near = sum(one[at] <= WITHIN for one in each)
        text = f"{words} the fastest, within the noise, in {fastest} of {len(each)} rows; at most {WITHIN - 1:.0%} "
        said.append(f"{text}slower in {near}; at worst {max(one[at] for one in each):.3f} times the fastest.")
    return f"`{name}`: {said[0]} {said[1].capitalize()}"


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
