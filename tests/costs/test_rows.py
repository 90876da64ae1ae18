"""Typical rows: what they hold, and that the kernels' layouts are the layout's own."""

import numpy as np
import pytest

from tests.helpers.stages import load_for_a_pod
from vocojax.costs.kernels.layouts import layouts
from vocojax.costs.rows import TEXT, UNIT, lay_out, typical_rows
from vocojax.costs.steps.attention import image_chunks
from vocojax.data.config import DataConfig
from vocojax.layout import UnitShape


def test_rows_are_full_of_typical_samples():
    """A mean sample has 0.94 units of 579 tokens and 460 of text."""
    rows = typical_rows(200)
    fill = rows.tokens / 2048
    assert 0.95 < fill < 1 and (rows.stop > np.arange(2048)).mean() == pytest.approx(fill)
    assert rows.tokens == pytest.approx(579 * rows.images + rows.text)
    assert rows.text / rows.images == pytest.approx(np.mean(TEXT) / 0.94, rel=0.05)
    again = typical_rows(3)
    assert (again.start == rows.start[:3]).all() and (again.stop == rows.stop[:3]).all()


@pytest.mark.parametrize(("length", "images"), [(700, 1), (2048, 2)])
def test_rows_keep_to_their_shape(length, images):
    rows = typical_rows(20, length, images)
    assert rows.start.shape == (20, length) and 0 < rows.images <= images and rows.tokens <= length


def test_a_sample_has_the_tokens_that_were_asked_for():
    for units, text in ((0, 20), (1, 1), (3, 900)):
        assert len(lay_out(units, text)) == 579 * units + text and lay_out(units, text).unit == UNIT
    assert len(lay_out(1, 900, most=1000)) == 1000


def test_the_layouts_of_the_kernels_are_what_they_were():
    """`start` and `stop` written out: of a unit's keys the VoCo token's alone reaches the end of the text."""
    found = layouts()
    for letter, units, length, text in (("b", 1, 576, 128), ("c", 64, 258, 128), ("d", 0, 0, 8192)):
        total = units * length + text
        start, stop = np.zeros(total, np.int32), np.full(total, total, np.int32)
        for unit in range(units):
            start[unit * length : (unit + 1) * length] = unit * length
            stop[unit * length : (unit + 1) * length - 1] = (unit + 1) * length
        assert (found[letter].start == [start]).all() and (found[letter].stop == [stop]).all(), letter
    rows = typical_rows(8)
    assert (found["a"].start == rows.start).all() and (found["a"].stop == rows.stop).all()


def test_the_shapes_are_the_seven_billion_s():
    assert UnitShape(576, 1) == UNIT and DataConfig.row_length == 2048


def test_chunks_of_images():
    """Eight rows have 24 slots for images. Typical samples fill 15 of them."""
    stage = load_for_a_pod("voco")
    assert image_chunks(stage, 8, "TPU v5 lite") == (8, 12), "of 2 images"
    assert image_chunks(stage, 8, "TPU v5") == (2, 3), "of 8 images"
