"""What makes tiny trainings quick in tests that look at neither pictures nor answers."""

import gc
import io

import pytest

SHORT_ANSWER = 4


@pytest.fixture(autouse=True, scope="module")
def quick(request):
    """A tiny training takes half of its time for its report's pictures and for answers to held-out rows. In a module
    that looks at neither, pictures are blank and answers are short; `pytestmark = pytest.mark.whole` keeps both."""
    gc.collect()
    gc.freeze()  # what the modules before have imported stays
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("whole") is None:
            blank = blank_picture()
            patch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **how: file.write(blank))
            patch.setattr("llamanb.evaluate.LONGEST_ANSWER", SHORT_ANSWER)
            patch.setattr("llamanb.evaluate.CONTINUATION", SHORT_ANSWER)
        yield


def blank_picture() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGBA", (1, 1)).save(file, format="png")
    return file.getvalue()
