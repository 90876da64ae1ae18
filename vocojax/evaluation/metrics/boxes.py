"""Parsers of boxes in answers, and intersection over union; `vocojax.data.boxes` says how boxes are written."""

import re
from collections.abc import Sequence

import numpy as np

from vocojax.data.boxes import Box

_NUMBER = r"\d(?:\.\d*)?"
_ONE_BOX = rf"{_NUMBER}(?:,{_NUMBER}){{3}}"
_BOXES = re.compile(rf"\[({_ONE_BOX}(?:;{_ONE_BOX})*)\]")
_SIGNED = r"(-?\d+(?:\.\d+)?)"
_FIRST_BOX = re.compile(r"\[\s*" + r",\s*".join([_SIGNED] * 4) + r"\s*\]")
NO_BOX: Box = (0.0, 0.0, 0.0, 0.0)  # what counts where no box can be read


def shikra_box(text: str) -> Box | None:
    """Returns the only box of a text, as Shikra reads it; None if there is no box or more than one."""
    found = _BOXES.findall(text)
    if len(found) != 1 or ";" in found[0]:
        return None
    left, top, right, bottom = map(float, found[0].split(","))
    return left, top, right, bottom


def first_shikra_box(text: str) -> Box | None:
    """Returns the first box of a text, in Shikra's form; None if there is none."""
    found = _BOXES.search(text)
    if found is None:
        return None
    left, top, right, bottom = map(float, found.group(1).split(";")[0].split(","))
    return left, top, right, bottom


def first_box_lmms_eval(text: str) -> Box | None:
    """Returns lmms-eval's reading: the first four numbers in brackets, spaces and signs allowed; None without any."""
    found = _FIRST_BOX.search(text)
    if found is None:
        return None
    left, top, right, bottom = map(float, found.groups())
    return left, top, right, bottom


def shikra_ious(boxes: Sequence[Box], golds: Sequence[Box]) -> np.ndarray:
    """Returns the intersection over union of pairs of boxes in [0, 1], as Shikra computes it.

    Its arithmetic is torchvision's in float32, on a thousand times the coordinates. A pair whose union has no area
    (0 / 0 there) gets 0 here: it is no hit in either, and does not make the mean NaN.

    Args:
      boxes: predicted.
      golds: as many.

    Returns:
      float32 [pairs].
    """
    a, b = (np.asarray(each, np.float32).reshape(-1, 4) * np.float32(1000) for each in (boxes, golds))
    area = lambda box: (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    size = np.maximum(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), np.float32(0))
    inter = size[:, 0] * size[:, 1]
    union = area(a) + area(b) - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union != 0)


def iou(box: Sequence[float], gold: Sequence[float]) -> float:
    """Returns the intersection over union of two boxes in float64; 0 where the union has no area."""
    width = max(0.0, min(box[2], gold[2]) - max(box[0], gold[0]))
    height = max(0.0, min(box[3], gold[3]) - max(box[1], gold[1]))
    area = lambda corners: (corners[2] - corners[0]) * (corners[3] - corners[1])
    union = area(box) + area(gold) - width * height
    return width * height / union if union else 0.0


def grit_iou(box: Sequence[float], gold: Sequence[float]) -> float:
    """Returns GRIT's intersection over union: a box with swapped corners has no area, 1e-6 is added to the union."""
    inside = (max(box[0], gold[0]), max(box[1], gold[1]), min(box[2], gold[2]), min(box[3], gold[3]))
    inter, own, other = (
        0.0 if right <= left or bottom <= top else (right - left) * (bottom - top)
        for left, top, right, bottom in (inside, tuple(box), tuple(gold))
    )
    return inter / (own + other - inter + 1e-6)
