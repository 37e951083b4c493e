"""Code lines of the package against the limits of the design. Blank lines, comments and docstrings do not count.

python .ci/size.py
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "llamanb"
PACKAGE_LIMIT, MODULE_LIMIT = 6000, 350
EXTRAS = ("shrink/", "export/", "scale/", "scale.py", "gpu_check.py", "tradeoffs.py", "claims.py", "tiny/make.py")
"""Not on the way of the quickstart, and never imported by it (tests/unit/test_layers.py)."""
REPLAY = ("tape/", "allocator.py")
"""What memory.py predicts from; stands by itself, and is counted apart (docs/decisions/0007)."""
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
    extras, replay = (
        sum(size for path, size in sizes.items() if path.relative_to(PACKAGE).as_posix().startswith(group))
        for group in (EXTRAS, REPLAY)
    )
    print(f"{total:6d}  in all: {extras} in extras, {replay} in the replay that memory is predicted from")
    print(f"{total - extras - replay:6d}  the package without them, limit {PACKAGE_LIMIT}")
    return int(total - extras - replay > PACKAGE_LIMIT or max(sizes.values()) > MODULE_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
