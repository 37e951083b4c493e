import pytest

from llamanb import Recipe, load_data
from llamanb.errors import LlamanbError
from tests.malformed import CASES, source


def test_there_are_forty_at_least():
    assert len(CASES) >= 40


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error(case, tmp_path, mini, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LlamanbError) as caught:
        load_data(Recipe(model=str(mini), dataset=source(case, tmp_path)))
    error = caught.value
    assert all(line.strip() for line in (error.what, error.why, error.fix))
    for named in CASES[case][2]:
        assert named in str(error)
