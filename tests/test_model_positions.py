import math

import pytest
import torch

from stacklm.model.positions import Positions, rotations, sinusoids


def test_positions_count_from_zero_up_to_the_context():
    assert Positions(4)(torch.zeros(3, 4)).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="window of 5 tokens is longer than the model's context of 4"):
        Positions(4)(torch.zeros(3, 5))


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids_follow_the_paper(width):
    table = sinusoids(torch.arange(20.0), width)
    assert table.shape == (20, width)
    for t, i in [(0, 0), (1, 0), (3, 2), (19, 4), (19, 6)]:
        angle = t / 10_000 ** (i / (2 * ((width + 1) // 2)))
        assert table[t, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        if i + 1 < width:
            assert table[t, i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_rotations_turn_each_plane_at_its_own_speed():
    cos, sin = rotations(torch.arange(20.0), 6)
    assert cos.shape == sin.shape == (20, 1, 3)
    for plane in range(3):
        assert math.atan2(sin[1, 0, plane], cos[1, 0, plane]) == pytest.approx(10_000 ** (-plane / 3), rel=1e-5)
