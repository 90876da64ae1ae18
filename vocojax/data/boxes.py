"""Boxes and points in text, as Shikra writes them (arXiv 2306.15195): `[0.123,0.456,0.789,0.999]`.

A box is (left, top, right, bottom), a point (x, y). Coordinates are shares of the image padded to a square around its
centre, in [0, 1], with three decimals.
"""

from collections.abc import Sequence

Box = tuple[float, float, float, float]


def box_text(boxes: Sequence[Sequence[float]]) -> str:
    """Writes boxes or points in Shikra's form."""
    return "[" + ";".join(",".join(f"{number:.3f}" for number in box) for box in boxes) + "]"


def to_padded_square(coordinates: Sequence[float], width: int, height: int) -> tuple[float, ...]:
    """Returns pixel coordinates (x, y, ...) as shares of the image padded to a square around its centre.

    Args:
      coordinates: of a box or a point, in pixels of the image.
      width: of the image.
      height: of the image.

    Returns:
      As many numbers in [0, 1], a box's rounded to three decimals as Shikra rounds them.
    """
    edge = max(width, height)
    offsets = ((edge - width) // 2, (edge - height) // 2)
    shares = [max(0.0, min((number + offsets[i % 2]) / edge, 1.0)) for i, number in enumerate(coordinates)]
    return tuple(round(share, 3) for share in shares) if len(shares) == 4 else tuple(shares)


def from_padded_square(box: Sequence[float], width: int, height: int) -> Box:
    """Returns a box on the padded square in pixels of the image, cut at the image's edges."""
    edge = max(width, height)
    offset_x, offset_y = (edge - width) // 2, (edge - height) // 2
    xs = [min(max(x * edge - offset_x, 0.0), float(width)) for x in box[0::2]]
    ys = [min(max(y * edge - offset_y, 0.0), float(height)) for y in box[1::2]]
    return xs[0], ys[0], xs[1], ys[1]
