"""Pillow's bicubic reduction of 8-bit RGB images, bit for bit, several times as fast and without the interpreter lock.

Pillow's own loops are scalar. Here both passes run over whole rows of memory (the horizontal one on transposed strips
of the image), which a compiler turns into vector instructions; the arithmetic is Pillow's: weights of 22 bits, sums in
int32, 8 bits between the passes.
"""

import functools

import numba
import numpy as np
import pyarrow as pa
from PIL import Image

PRECISION_BITS = 22
BLACK = (0, 0, 0)
STRIP = 32  # rows of the horizontal pass at a time: they and their result stay in a core's cache
_A = -0.5  # parameter of the cubic convolution


def resize(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Resizes an RGB image to uint8 [height, width, 3]; the pixels are those of Pillow's `BICUBIC`."""
    reduced_x, reduced_y = image.width - width, image.height - height
    # Pillow's horizontal pass comes first, as ours, except where rows are reduced most. Enlargements are cheap anyway.
    if min(reduced_x, reduced_y) < 0 or reduced_y >= 2 * reduced_x:
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.uint8)
    across = np.empty((image.height, width, 3), np.uint8)
    _reduce_columns(_pixels(image), image.width, _pixel(BLACK), *_weights(image.width, width), across)
    return _reduce_rows(across, height)


def resize_padded(image: Image.Image, size: int, colour: tuple[int, ...]) -> np.ndarray:
    """Puts an RGB image in the middle of a square of one colour and resizes that to uint8 [size, size, 3]."""
    side = max(image.size)
    top = (side - image.height) // 2
    if side < size:
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, top))
        return resize(square, size, size)
    # The horizontal pass does not change rows of one colour: only the image's own rows go through it.
    across = np.empty((side, size, 3), np.uint8)
    across[:top] = across[top + image.height :] = colour
    own = across[top : top + image.height]
    _reduce_columns(_pixels(image), side, _pixel(colour), *_weights(side, size), own)
    return _reduce_rows(across, size)


def _pixels(image: Image.Image) -> np.ndarray:
    """Returns Pillow's own memory as uint32 [h, w], or a copy if it is not contiguous, as for large images."""
    try:
        flat = pa.array(image).flatten().to_numpy(zero_copy_only=True)
    except ValueError:
        flat = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8)
    return flat.view(np.uint32).reshape(image.height, image.width)


def _pixel(colour: tuple[int, ...]) -> np.uint32:
    """Returns a pixel as Pillow keeps it, RGBX."""
    return np.array([*colour, 255], np.uint8).view(np.uint32)[0]


def _reduce_rows(pixels: np.ndarray, height: int) -> np.ndarray:
    """Does the vertical pass, from uint8 [h, w, 3] to [height, w, 3]."""
    out = np.empty((height, *pixels.shape[1:]), np.uint8)
    _weigh_rows(pixels.reshape(len(pixels), -1), *_weights(len(pixels), height), out.reshape(height, -1))
    return out


@functools.lru_cache(maxsize=1024)
def _weights(size: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for every target row the first row that it depends on, how many, and their fixed-point weights."""
    scale = size / target
    stretch = max(scale, 1.0)
    centre, support = (np.arange(target) + 0.5) * scale, 2 * stretch
    first = np.maximum((centre - support + 0.5).astype(int), 0)
    count = np.minimum((centre + support + 0.5).astype(int), size) - first
    tap = np.arange(count.max())
    x = np.abs((tap + first[:, None] - centre[:, None] + 0.5) / stretch)
    near, far = ((_A + 2) * x - (_A + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * _A
    weights = np.where(tap < count[:, None], np.where(x < 1, near, np.where(x < 2, far, 0.0)), 0.0)
    weights = weights / weights.sum(1, keepdims=True) * 2**PRECISION_BITS
    return first, count, np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)


@numba.njit(nogil=True, cache=True)
def _weigh_rows(rows, first, count, weights, out):  # type: ignore[no-untyped-def]
    total = np.empty(rows.shape[1], np.int32)
    for i in range(len(out)):
        total[:] = 1 << (PRECISION_BITS - 1)
        for tap in range(count[i]):
            row, weight = rows[first[i] + tap], weights[i, tap]
            for x in range(len(total)):
                total[x] += np.int32(row[x]) * weight
        for x in range(len(total)):
            out[i, x] = min(max(total[x] >> PRECISION_BITS, 0), 255)


@numba.njit(nogil=True, cache=True)
def _reduce_columns(pixels, side, ground, first, count, weights, out):  # type: ignore[no-untyped-def]
    """Does the horizontal pass, by the vertical one on transposed strips of rows.

    Args:
      pixels: uint32 [h, w], of four bytes each.
      side: width of the ground that they are in the middle of.
      ground: uint32, its colour.
      first: see `_weights`, of `side`.
      count: see `_weights`.
      weights: see `_weights`.
      out: uint8 [h, new width, 3].
    """
    width, left = pixels.shape[1], (side - pixels.shape[1]) // 2
    strip = np.full((side, STRIP), ground, np.uint32)
    turned = strip[left : left + width]
    reduced = np.empty((len(first), STRIP), np.uint32)
    reduced_bytes = reduced.view(np.uint8).reshape(len(first), STRIP, 4)
    for top in range(0, len(pixels), STRIP):
        rows = pixels[top : top + STRIP]
        for x in range(width):
            for y in range(len(rows)):
                turned[x, y] = rows[y, x]
        _weigh_rows(strip.view(np.uint8), first, count, weights, reduced.view(np.uint8))
        for y in range(len(rows)):
            for x in range(len(first)):
                for channel in range(3):
                    out[top + y, x, channel] = reduced_bytes[x, y, channel]


