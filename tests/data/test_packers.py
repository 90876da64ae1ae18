"""Packers: records with videos are laid out ahead of time, and the rows are the same."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from vocojax.data.packers import Packer
from vocojax.data.packing import Size
from vocojax.layout import LayoutError

SHAPE = SimpleNamespace(length=100, images=10, targets=100)


class Records:
    """Thirty records, of which every seventh can't be used. Laying one out takes as long as reading a video."""

    def __init__(self, seconds=0.0):
        self.seconds, self.reads_videos, self.running, self.most = seconds, False, 0, 0
        self._lock = threading.Lock()

    def __len__(self):
        return 30

    def lay_out(self, record, position=0):
        self.reads_videos = True
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.seconds * (1 + record % 3))
        with self._lock:
            self.running -= 1
        if record % 7 == 0:
            raise LayoutError(f"r{record}", "can't be used", "unusable")
        size = int(np.random.default_rng(record).integers(20, 60))
        return SimpleNamespace(record=record, size=Size(size, 1, 5), layout=SimpleNamespace(dropped=0))


def rows(packer, count):
    plans = [packer.next_row() for _ in range(count)]
    return [([position for position, _ in plan.members], plan.report) for plan in plans]


@pytest.mark.parametrize("resumed_after", [0, 3])
def test_rows_are_the_same_with_records_laid_out_ahead(resumed_after):
    def packer(source, pool=None):
        return Packer(1, 2, 7, source, SHAPE, window=6, count_once=False, pool=pool)

    expected = rows(packer(Records()), 12)
    source = Records(0.003)
    with ThreadPoolExecutor(4) as pool:
        again = packer(source, pool)
        if resumed_after:
            report = expected[resumed_after - 1][1]
            again.set_state({"position": report.position, "window": report.window})
        assert rows(again, 12 - resumed_after) == expected[resumed_after:]
    assert source.most > 1 and any(report.skipped for _, report in expected)
