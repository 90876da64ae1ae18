"""Packing: rows hold their samples unchanged, and padding and neighbours are invisible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_layout import Letters, pairs
from vocojax.costs.data import fill_ratio
from vocojax.data.packing import Item, RowShape, Size, best_fit, pack_row
from vocojax.layout import IGNORE, LayoutError, Role, Span, UnitShape, lay_out_sample
from vocojax.view import View

UNIT = UnitShape(2, 1)
SHAPE = RowShape(40, 3, 8, 4, 2, (("", "voco"), ("teacher_", "causal")))


def item(units, text, mark=0):
    spans = [Span("q"), Span(text, True)]
    layout = lay_out_sample(text, units, [spans], Letters(), UNIT, 100)
    return Item(layout, tuple(np.full((4, 4, 3), 10 * mark + i + 1, np.uint8) for i in range(units)))


ITEMS = st.lists(st.tuples(st.integers(0, 2), st.text("xyz", min_size=1, max_size=6)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(ITEMS)
def test_rows_hold_every_sample_once_and_nothing_crosses(drawn):
    items = [item(units, text, mark) for mark, (units, text) in enumerate(drawn)]
    groups, left = [], list(items)
    while left:
        sizes = [Size(len(i.layout), len(i.images), i.layout.num_targets) for i in left]
        chosen = best_fit(sizes, Size(SHAPE.length, SHAPE.images, SHAPE.targets))
        assert chosen[0] == 0 and len(set(chosen)) == len(chosen)
        groups.append([left[i] for i in chosen])
        left = [i for index, i in enumerate(left) if index not in chosen]
    for group in groups:
        row = pack_row(group, SHAPE)
        for prefix, visibility in SHAPE.views:
            view = View(row[prefix + "positions"], row[prefix + "start"], row[prefix + "stop"])
            expected, first = set(), 0
            for member in group:
                own = member.layout.view(visibility)
                expected |= {(i + first, j + first) for i, j in pairs(own)}
                assert (view.positions[first : first + len(own.positions)] == own.positions).all()
                first += len(member.layout)
            assert pairs(view) == expected
        assert row["num_tokens"] == first


def test_a_row_literally():
    row = pack_row([item(1, "ab", 0), item(0, "c", 1)], SHAPE)
    assert row["ids"][:13].tolist() == [1, 1, 1, 10, 1000, 10, 113, 97, 98, 1, 113, 99, 0]
    assert row["vision"][:13].tolist() == [-1, 0, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1]
    assert row["target_index"].tolist() == [6, 7, 10, 0, 0, 0, 0, 0]
    assert row["target_ids"].tolist() == [97, 98, 99] + [IGNORE] * 5
    assert row["images"][:, 0, 0, 0].tolist() == [1, 0, 0]


def test_the_second_sample_s_vision_tokens_point_to_its_own_images():
    row = pack_row([item(1, "a", 0), item(2, "b", 1)], SHAPE)
    is_vision = row["vision"] >= 0
    assert row["vision"][is_vision].tolist() == [0, 1, 2, 3, 4, 5]
    assert row["images"][:, 0, 0, 0].tolist() == [1, 11, 12]


def test_a_sample_larger_than_a_row_is_named():
    with pytest.raises(LayoutError, match="record 'abcdefghi': does not fit into a row of 40 tokens, 3 images and 8"):
        pack_row([item(0, "abcdefghi")], SHAPE)


def test_vision_roles_are_counted_for_every_image():
    layout = item(2, "a").layout
    assert (layout.roles == Role.VISION).sum() == 4


def test_best_fit_takes_the_first_item_and_then_the_longest_that_fits():
    sizes = [Size(5, 1, 1), Size(4, 0, 1), Size(6, 0, 1), Size(3, 0, 1), Size(1, 0, 9), Size(1, 0, 1)]
    assert best_fit(sizes, Size(10, 1, 4)) == [0, 1, 5]
    assert best_fit(sizes, Size(11, 1, 2)) == [0, 2]
    assert best_fit(sizes, Size(100, 0, 3)) == [1, 2, 3]
    assert best_fit([], Size(10, 1, 4)) == []


def test_rows_are_at_least_95_percent_full():
    """Row length 2,048; samples of one image of 579 tokens with 20 to 900 tokens of text, 6 % text alone."""
    assert 0.95 <= fill_ratio(600) < 1
