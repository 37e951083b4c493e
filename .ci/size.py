"""Code lines of the package against the limits of the design. Blank lines, comments and docstrings do not count.

python .ci/size.py
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "llamanb"
PACKAGE_LIMIT, MODULE_LIMIT = 6500, 350  # docs/decisions/0014
EXTRAS = (
    "shrink/",
    "export/",
    "scale/",
    "__main__.py",
    "gpu_check.py",
    "rehearsal.py",
    "reach.py",
    "tradeoffs.py",
    "tradeoffs_picture.py",
    "claims.py",
    "chat.py",
    "ui/chat_form.py",
    "tiny/make.py",
    "setup/environment.py",
    "data/padding.py",
)
"""Not on the way of the quickstart, and never imported by it (tests/unit/test_layers.py)."""
REPLAY = ("tape/", "allocator.py")
"""What memory.py predicts from; stands by itself, and is counted apart (docs/decisions/0007)."""
FUSED = ("model/fused.py", "model/products.py", "model/kernels.py", "model/elementwise.py", "model/head.py")
FUSED += ("model/row_attention.py", "training/optimizer.py")
"""What computes the numbers of transformers' layers, trl's loss and bitsandbytes' AdamW faster; the same
(docs/decisions/0011)."""
STREAMED = ("model/streamed.py", "model/piecewise.py", "model/quantized.py", "model/homes.py", "model/weight_files.py")
STREAMED += ("streaming.py", "copies.py", "disk.py")
"""What brings weights to the card that wait in host memory or on disk, and plans for it; the same (0019)."""
IDLE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in IDLE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):  # a string on its own: docstrings of modules, functions and fields
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def main() -> int:
    sizes = {path: code_lines(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    for path, size in sorted(sizes.items(), key=lambda item: -item[1]):
        mark = f"  over {MODULE_LIMIT}" if size > MODULE_LIMIT else ""
        print(f"{size:6d}  {path.relative_to(PACKAGE.parent)}{mark}")
    total = sum(sizes.values())
    groups = {
        "extras": EXTRAS,
        "the replay that memory is predicted from": REPLAY,
        "fused layers": FUSED,
        "streamed layers": STREAMED,
    }
    apart = {
        name: sum(size for path, size in sizes.items() if path.relative_to(PACKAGE).as_posix().startswith(group))
        for name, group in groups.items()
    }
    rest = total - sum(apart.values())
    print(f"{total:6d}  in all: " + ", ".join(f"{size} in {name}" for name, size in apart.items()))
    print(f"{rest:6d}  the package without them, limit {PACKAGE_LIMIT}")
    return int(rest > PACKAGE_LIMIT or max(sizes.values()) > MODULE_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
