"""The arrows of the design: who may import whom, and that `import llamanb` stays light."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "llamanb"
FILES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def _imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it, with `from llamanb import hub` as `llamanb.hub`."""
    return _imported(ast.parse(path.read_text()))


def _imported(module: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def _uses(name: str) -> set[str]:
    return {
        str(path.relative_to(PACKAGE).with_suffix(""))
        for path in FILES
        if any(module == name or module.startswith(f"{name}.") for module in _imports(path))
    }


def test_import_loads_neither_torch_nor_matplotlib():
    heavy = "torch", "matplotlib", "transformers", "datasets", "numpy", "pynvml", "ipywidgets"
    code = f"import llamanb, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_import_asks_for_expandable_segments_and_leaves_a_users_own_setting():
    code = "import llamanb, os; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert asked.stdout.strip() == "expandable_segments:True"
    own = {**env, "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    kept = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=own)
    assert kept.stdout.strip() == "None"


def test_every_public_name_loads():
    code = "import llamanb; print([getattr(llamanb, n) is None for n in llamanb.__all__].count(True))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "0"


def test_a_name_is_the_same_whatever_was_imported_before():
    code = "import llamanb.layout, llamanb.planner; from llamanb import plan; print(callable(plan))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"


@pytest.mark.parametrize(
    ("library", "places"),
    [
        ("ipywidgets", ("ui",)),
        ("pynvml", ("nvml",)),
        ("matplotlib", ("plots", "tradeoffs_picture", "shrink/picture", "scale/picture")),
        ("bitsandbytes", ("model", "training", "export")),
        ("trl", ("training",)),
        ("peft", ("model", "shrink/start")),
        ("gguf", ("export",)),
        ("datasets", ("data", "training", "quiet")),
        ("huggingface_hub", ("hub", "export/upload")),
    ],
)
def test_a_library_is_used_in_its_place_only(library, places):
    assert {user for user in _uses(library) if not user.startswith(places)} == set()


def test_nothing_imports_the_widgets():
    assert {user for user in _uses("llamanb.ui") if not user.startswith("ui")} == set()


LAYERS = [  # a module may import those of its own line and of the lines above it
    {"errors", "html", "tiny"},
    {"setup"},
    {"recipe"},
    {"nvml"},
    {"hub"},
    {"architecture"},
    {"card", "cards", "measured", "pretend", "precision", "rates", "trials", "machine", "disk"},
    {"turns"},
    {"tape"},
    {"allocator"},
    {"memory"},
    {"copies"},
    {"speed"},
    {"streaming"},
    {"layout"},
    {"search"},
    {"planner", "data", "gpu_check"},
    {"advice"},
    {"reach"},
    {"timeline", "attempts", "scores", "ranks"},
    {"model", "plots", "generate", "evaluate", "quiet", "starter"},
    {"watch"},
    {"run"},
    {"report", "out_of_memory"},
    {"training"},
    {"export", "chat"},
    {"claims"},
    {"tradeoffs_picture"},
    {"tradeoffs"},
    {"shrink"},
    {"rehearsal"},
    {"scale"},
    {"ui"},
    {"__main__"},
]
LATER = {("planner", "advice")}
"""Arrows that point back, and only when a function runs: a plan that does not fit asks what would."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def test_arrows_point_one_way():
    wrong = []
    for path in FILES:
        part = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in _imports(path):
            other = module.split(".")[1] if module and module.startswith("llamanb.") else None
            if part in RANK and other in RANK and RANK[other] > RANK[part] and (part, other) not in LATER:
                wrong.append(f"{part} imports {other}")
    assert wrong == []


def test_every_module_has_its_place():
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES}
    assert parts - {"__init__"} == RANK.keys()


@pytest.mark.parametrize(("part", "later"), sorted(LATER))
def test_what_points_back_is_imported_inside_functions_only(part, later):
    module = ast.parse((PACKAGE / f"{part}.py").read_text())
    at_the_top = ast.Module([node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not [name for name in _imported(at_the_top) if name and name.startswith(f"llamanb.{later}")]
    assert [name for name in _imported(module) if name and name.startswith(f"llamanb.{later}")]


EXTRAS = {
    "shrink",
    "export",
    "scale",
    "__main__",
    "gpu_check",
    "rehearsal",
    "reach",
    "tradeoffs",
    "tradeoffs_picture",
    "claims",
    "chat",
    "ui.chat_form",
    "tiny.make",
    "setup.environment",
    "data.padding",
}


def test_nothing_imports_an_extra():
    """What .ci/size.py counts apart is not on the way of the quickstart; one extra may use another."""
    homes = [name.replace(".", "/") for name in EXTRAS]
    for extra in EXTRAS:
        users = _uses(f"llamanb.{extra}")
        assert [user for user in users if not any(f"{user}/".startswith(f"{home}/") for home in homes)] == [], extra


def test_only_the_optimizer_step_knows_fused_layers():
    """They are counted apart, since all else is the same without them (docs/decisions/0011)."""
    for module in ("fused", "head"):
        assert _uses(f"llamanb.model.{module}") == {"training/step"}
    assert _uses("llamanb.training.optimizer") == {"training/step", "training/saves"}
    assert _uses("llamanb.model.products") == {"model/fused"}
    for module in ("kernels", "elementwise"):
        users = _uses(f"llamanb.model.{module}")
        assert users <= {f"model/{user}" for user in ("fused", "products", "head", "elementwise")} | {"training/step"}


def test_only_loading_and_fused_layers_know_streamed_ones():
    """They are counted apart too (docs/decisions/0019)."""
    assert _uses("llamanb.model.streamed") == {"model/fused", "model/piecewise", "scale/sharded"}
    assert _uses("llamanb.model.piecewise") == {"model/load"}
    assert _uses("llamanb.model.quantized") == {"model/piecewise", "scale/sharded"}
    assert _uses("llamanb.model.weight_files") == {f"model/{user}" for user in ("homes", "piecewise", "quantized")}
    assert _uses("llamanb.model.homes") == {"model/piecewise", "model/streamed"}
    assert _uses("llamanb.copies") == {"search", "speed", "streaming"}
    assert _uses("llamanb.streaming") == {"search", "planner", "advice", "reach", "training/__init__", "ui/form"}


def test_no_file_a_reader_would_dread():
    assert [f"{path}: {n}" for path in FILES if (n := len(path.read_text().splitlines())) > 400] == []
