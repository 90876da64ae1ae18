"""Boxes in text and on the padded square."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vocojax.data import boxes


def test_boxes_on_the_padded_square():
    # 100 wide, 50 high: padded by 25 above.
    assert boxes.to_padded_square((0, 0, 100, 50), 100, 50) == (0.0, 0.25, 1.0, 0.75)
    assert boxes.box_text([(0.0, 0.25, 1.0, 0.75)]) == "[0.000,0.250,1.000,0.750]"
    assert boxes.to_padded_square((-5, 0), 50, 101) == (20 / 101, 0.0)  # a point is not rounded


@given(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_padding_boxes_and_back_is_the_same_to_a_thousandth_of_the_edge(size, shares):
    width, height = size
    box = [shares[0] * width, shares[1] * height, shares[2] * width, shares[3] * height]
    back = boxes.from_padded_square(boxes.to_padded_square(box, width, height), width, height)
    assert np.allclose(back, box, atol=0.0006 * max(size))
