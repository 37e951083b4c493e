import gc
import signal
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[1]
REAL_DATA = (ROOT.parent / "shared" / "data", ROOT / ".gpu" / "data")


def pytest_collection_finish(session):
    """What is imported by now stays: a training collects garbage four times, and would look at all of torch each time,
    for a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real instruction rows, SQuAD rows and Llama 3's vocabulary, which are not part of the project."""
    found = next((folder for folder in REAL_DATA if folder.is_dir()), None)
    if found is None:
        pytest.skip(f"real data is not here: {' or '.join(map(str, REAL_DATA))}")
    return found


@pytest.fixture(scope="session")
def trl_template():
    """`trl_template("llama3_1")`: Meta's chat templates, as trl carries them."""
    import importlib.util

    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    return lambda name: (folder / f"{name}.jinja").read_text()


@pytest.fixture(scope="session")
def mini(tmp_path_factory) -> Path:
    """A checkpoint of two layers with random weights."""
    return make_checkpoint("mini", tmp_path_factory.mktemp("mini"))


@pytest.fixture(autouse=True, scope="session")
def interrupts_are_heard():
    """A shell starts what runs in its background with interrupts ignored, and Python leaves that as it is."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
