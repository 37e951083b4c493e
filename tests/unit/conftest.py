from pathlib import Path

import pytest

from tests.checkpoints import byte_tokenizer, make_checkpoint

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real instruction rows, SQuAD rows and Llama 3's vocabulary, which are not part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is not here: {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def trl_template():
    """`trl_template("llama3_1")`: Meta's chat templates, as trl carries them."""
    import importlib.util

    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    return lambda name: (folder / f"{name}.jinja").read_text()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte tokenizer with Llama 3's special tokens and chat format."""
    from llamanb.data.encode import LLAMA3_TEMPLATE

    made = byte_tokenizer(template=LLAMA3_TEMPLATE)
    made.pad_token = "<|finetune_right_pad_id|>"
    return made


@pytest.fixture(scope="session")
def mini(tmp_path_factory) -> Path:
    """A checkpoint of two layers with random weights."""
    return make_checkpoint("mini", tmp_path_factory.mktemp("mini"))


@pytest.fixture
def chat_rows(tmp_path) -> Path:
    """Twelve rows that differ, in Alpaca's format."""
    import json

    path = tmp_path / "rows.jsonl"
    rows = ({"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(12))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
