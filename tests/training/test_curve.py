"""The loss curve is a picture, also of a climb that has only begun."""

import pytest

pytest.importorskip("matplotlib", reason="the curve needs the train extra")
pytest.importorskip("torch", reason="training needs the train extra")

from training.checkpoint import Progress
from training.curve import _apart, draw_curve

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("num_losses", [0, 1, 50])
def test_a_curve_is_drawn(tmp_path, num_losses):
    losses = [(1000 * i, 5.0 / (1 + i)) for i in range(num_losses)]
    scores = [{"rung": "pairs-4", "num_tokens": 20_000}, {"rung": "pairs-8", "num_tokens": 40_000}]
    file = tmp_path / "deep" / "curve.png"
    draw_curve(Progress(losses=losses, scores=scores), file, "Training")
    assert file.read_bytes().startswith(PNG)


def test_names_of_short_rungs_do_not_lie_on_each_other():
    assert _apart([0.1, 0.2, 1.5, 1.6, 9.0], 0.5) == [0.1, 0.6, 1.5, 2.0, 9.0]
    assert _apart([], 0.5) == []
