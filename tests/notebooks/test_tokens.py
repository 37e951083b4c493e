"""A token is nowhere in an executed notebook, also not in the traceback of one that stopped."""

import pytest
from papermill import PapermillExecutionError

from tests.unit.test_canary import CANARY, places
from tests.unit.test_hub import endpoint  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "owner/wrong-token", "owner/broken"])
def test_what_stops_a_notebook_does_not_tell_it(run_notebook, tmp_path, monkeypatch, endpoint, model):  # noqa: F811
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with pytest.raises(PapermillExecutionError) as caught:
        run_notebook("01_quickstart", model=model)
    assert "Error" in str(caught.value)
    assert CANARY not in str(caught.value)
    assert (tmp_path / "01_quickstart.ipynb").stat().st_size > 10_000
    assert places(CANARY, tmp_path) == []
