import pytest

from tests.checkpoints import byte_tokenizer
from tests.quick import quick  # noqa: F401


@pytest.fixture(scope="session")
def tokenizer():
    """A byte tokenizer with Llama 3's special tokens and chat format."""
    from llamanb.data.encode import LLAMA3_TEMPLATE

    made = byte_tokenizer(template=LLAMA3_TEMPLATE)
    made.pad_token = "<|finetune_right_pad_id|>"
    return made


@pytest.fixture(scope="session")
def tuned_run(tmp_path_factory):
    """The tiny Llama, trained long enough to know its format. Read it; whoever writes into its folder takes a copy."""
    from llamanb import Card, Recipe, plan, train
    from llamanb.tiny import DEFAULTS

    recipe = Recipe(model="tiny", dataset="tiny", eval_rows=12, **{**DEFAULTS, "steps": 40})
    return train(plan(recipe, Card("CPU", None)), runs=tmp_path_factory.mktemp("runs"))
