"""Rows of text after a prefix of compressed units: each text sees its own units and itself, at the right positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_packing import UNIT, item
from tests.test_layout import Letters
from vocojax.data.text_rows import TextRowShape
from vocojax.layout import IGNORE, LayoutError, Role, lay_out_unit
from vocojax.training.plan import deal

SHAPE = TextRowShape(12, 4, 8, 4, UNIT, lay_out_unit("unit", Letters(), UNIT))  # N = 1: a prefix of 4 keys


def test_a_row_literally():
    """A has two units and the text `newline, q, a`, B one unit and `newline, q, b, c`; a unit has 5 tokens."""
    row = SHAPE.pack([item(2, "a", 0), item(1, "bc", 1)])
    assert row["ids"].tolist() == [10, 113, 97, 10, 113, 98, 99, 0, 0, 0, 0, 0]
    assert row["positions"].tolist() == [6, 7, 8, 5, 6, 7, 8, 0, 0, 0, 0, 0]
    assert row["unit_slot"].tolist() == [2, 3, 1, -1] and row["unit_position"].tolist() == [0, 1, 0, 0]
    assert row["images"][:, 0, 0].tolist() == [1, 2, 11, 0]
    assert row["start"].tolist() == [2, 2, 2, 1, 1, 1, 1, 11, 12, 13, 14, 15]
    assert row["stop"].tolist() == [0, 11, 7, 7, 7, 7, 7, 11, 11, 11, 11, 11, 12, 13, 14, 15]
    assert row["target_index"].tolist() == [1, 4, 5, 0, 0, 0, 0, 0]
    assert row["target_ids"].tolist() == [97, 98, 99] + [IGNORE] * 5 and row["num_tokens"] == 7
    assert row["unit_ids"].tolist() == [0, 0, 0, 1, 1, 1, 10, 1000]
    assert row["unit_vision"].tolist() == [-1, -1, -1, -1, 0, 1, -1, -1]
    assert row["unit_start"].tolist() == [0, 1, 2, 3, 3, 3, 3, 3] and row["unit_stop"][:3].tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.text("xyz", min_size=1, max_size=2)), min_size=1, max_size=3))
def test_every_text_sees_what_it_sees_alone(drawn):
    items = [item(units, text) for units, text in drawn]
    if sum(len(i.images) for i in items) > 4 or sum(SHAPE.size(i.layout).tokens for i in items) > 12:
        with pytest.raises(LayoutError, match="does not fit into a row of 12 tokens of text, 4 images"):
            SHAPE.pack(items)
        return
    row = SHAPE.pack(items)
    key, query = np.arange(16), np.arange(4, 16)[:, None]
    sees_QK = (row["start"][:, None] <= key) & (key <= query) & (query < row["stop"])
    token = unit = 0
    for member in items:
        layout, size = member.layout, SHAPE.size(member.layout).tokens
        whole = layout.view("voco")
        index = np.arange(len(layout))
        sees = (whole.start[:, None] <= index) & (index <= index[:, None]) & (index[:, None] < whole.stop)
        kept = sees[layout.text_start :, (layout.roles == Role.VOCO) | (index >= layout.text_start)]
        slots = row["unit_slot"][unit : unit + layout.num_units]  # one VoCo token each: a slot is a key
        own = [*slots, *range(4 + token, 4 + token + size)]
        assert (sees_QK[token : token + size][:, own] == kept).all()
        assert sees_QK[token : token + size].sum() == kept.sum()
        token, unit = token + size, unit + layout.num_units
    assert not sees_QK[token:].any()


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 1), (4, 1), (2, 2)])
def test_units_are_dealt_out_evenly(devices, accumulate):
    """Of four rows the first has all but two of the units; images stay with their units."""
    rows = [SHAPE.pack([item(2, "a", 0), item(2, "b", 1)]), SHAPE.pack([item(1, "c", 2)]), SHAPE.pack([]),
            SHAPE.pack([item(1, "d", 3)])]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    dealt = deal(batch, devices, accumulate, first_text=8)
    assert dealt["text"].tolist() == [8, 9, 10, 11]
    found = sorted(zip(dealt["unit_text"].ravel(), dealt["unit_slot"].ravel(), dealt["images"][..., 0, 0].ravel(),
                       strict=True))
    assert found[-6:] == [(8, 0, 11), (8, 1, 12), (8, 2, 1), (8, 3, 2), (9, 3, 21), (11, 3, 31)]
    used = (dealt["unit_text"] >= 0).reshape(devices, accumulate, -1)
    for part in range(accumulate):
        counts = used[:, part].sum(-1)
        assert counts.max() - counts.min() <= 1
    if accumulate == 1:
        assert (used[..., :-1] >= used[..., 1:]).all(), "units come first, so that later chunks are skipped"
