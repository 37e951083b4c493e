import pytest

from tests.checkpoints import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """A byte tokenizer with Llama 3's special tokens and chat format."""
    from llamanb.data.encode import LLAMA3_TEMPLATE

    made = byte_tokenizer(template=LLAMA3_TEMPLATE)
    made.pad_token = "<|finetune_right_pad_id|>"
    return made
