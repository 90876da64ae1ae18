"""When the frames of a video are shown, from its packets or from its decoded frames."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SAME_RATE = 0.01  # a header's rate that differs by less from the measured one is taken: stamps are rounded


class Mark(NamedTuple):
    """The time stamp of a packet or a frame.

    Attributes:
      stamp: when it is shown, in ticks; None if nothing says so.
      is_key: whether decoding may start there.
      is_hidden: whether the container says that it is decoded but not shown (an edit list).
    """

    stamp: int | None
    is_key: bool
    is_hidden: bool = False


class Timeline(NamedTuple):
    """The frames of a video.

    Attributes:
      frames: their number.
      rate: frames per second.
      stamps: int64 [frames], increasing, in ticks; None if only counting tells the frames apart.
      keys: int64, increasing: where decoding may start. The first one is the beginning.
    """

    frames: int
    rate: float
    stamps: np.ndarray | None
    keys: np.ndarray


def timeline_of_packets(marks: Sequence[Mark], tick: float, rate: float) -> Timeline | None:
    """Returns the timeline of a video whose packets hold one frame each, or None if the packets leave any doubt.

    Args:
      marks: of the packets, in the order of decoding.
      tick: seconds.
      rate: frames per second in the header, or 0.
    """
    stamps = [mark.stamp for mark in marks if mark.stamp is not None]
    shown = sorted(mark.stamp for mark in marks if mark.stamp is not None and not mark.is_hidden)
    keys = [mark.stamp for mark in marks if mark.stamp is not None and mark.is_key]
    if len(stamps) < len(marks) or not shown or not marks[0].is_key or shown[0] < keys[0]:
        return None
    hidden = [mark.stamp for mark in marks if mark.stamp is not None and mark.is_hidden]
    if any(shown[0] <= stamp <= shown[-1] for stamp in hidden):  # parts were cut out of the middle, or moved
        return None
    if not _increase(shown) or not _increase(keys):
        return None
    return Timeline(len(shown), _rate(shown, tick, rate), np.array(shown), np.array(keys))


def timeline_of_frames(marks: Sequence[Mark], tick: float, rate: float) -> Timeline:
    """Returns the timeline of frames that were decoded.

    Args:
      marks: of all frames, in the order in which decoding yields them.
      tick: seconds.
      rate: frames per second in the header, or 0.
    """
    stamps = [mark.stamp for mark in marks if mark.stamp is not None]
    keys = np.array([mark.stamp for mark in marks if mark.stamp is not None and mark.is_key], np.int64)
    if len(stamps) < len(marks) or not _increase(stamps):
        return Timeline(len(marks), rate or 1.0, None, keys[:0])
    return Timeline(len(marks), _rate(stamps, tick, rate), np.array(stamps, np.int64), keys)


def _increase(stamps: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(stamps))


def _rate(stamps: Sequence[int], tick: float, header: float) -> float:
    """Returns the frames per second between the first and the last frame; the header's value if it is about that."""
    seconds = (stamps[-1] - stamps[0]) * tick if stamps else 0.0
    if not seconds:
        return header or 1.0
    measured = (len(stamps) - 1) / seconds
    return header if abs(header - measured) < SAME_RATE * measured else measured
