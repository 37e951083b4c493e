"""Rows on which the tiny Llama can already do something, so that it can be seen to lose and regain it.

Its fine-tuning rows would not do: before fine-tuning it answers none of them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from llamanb.tiny import notes


def write_chats(path: str | Path, count: int = 1000, seed: int = 0) -> Path:
    """Chats of the kind that the tiny Llama was pretrained on, drawn anew: notes, three questions about each, answers.

    Returns the file, jsonl, the same for the same arguments.
    """
    rng = random.Random(f"shrink {seed}")
    lines = [json.dumps({"messages": notes.chat(rng, questions=3)}) for _ in range(count)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(path)
