"""Pillow's bicubic reduction of 8-bit RGB images, bit for bit, several times as fast and without the interpreter lock.

Pillow's own loops are scalar. Here both passes run over whole rows of memory (the horizontal one on transposed strips
of the image), which a compiler turns into vector instructions; the arithmetic is Pillow's: weights of 22 bits, sums in
int32, 8 bits between the passes. Several rows are taken at a time, since otherwise most of the time goes into loading
and storing the sums, and into single pixels of the transposed strips.
"""

import functools

import numba
import numpy as np
from PIL import Image

from vocojax.data.rgbx import as_image, rgbx_pixel

PRECISION_BITS = 22
BLACK = (0, 0, 0)
# Rows of the horizontal pass at a time. They and their result stay in a core's cache; an odd number of cache lines (16
# pixels each) lets the columns of the transposed strip use all of the first-level cache's sets.
STRIP = 5 * 16
TAPS = 8  # rows that the vertical pass adds up in one loop
_A = -0.5  # parameter of the cubic convolution


def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes an image (see `rgbx`) to uint8 [height, width, 3], whose pixels are those of Pillow's `BICUBIC`."""
    own_height, own_width = pixels.shape
    reduced_x, reduced_y = own_width - width, own_height - height
    # Pillow's horizontal pass comes first, as ours, except where rows are reduced most. Enlargements are cheap anyway.
    if min(reduced_x, reduced_y) < 0 or reduced_y >= 2 * reduced_x:
        return np.asarray(as_image(pixels).resize((width, height), Image.Resampling.BICUBIC), np.uint8)
    across = np.empty((own_height, 3 * width), np.uint8)
    _reduce_columns(pixels, own_width, rgbx_pixel(BLACK), *_weights(own_width, width), across)
    return _reduce_rows(across, height)


def resize_padded(pixels: np.ndarray, size: int, colour: tuple[int, ...]) -> np.ndarray:
    """Puts an image (see `rgbx`) in the middle of a square of one colour and resizes that to uint8 [size, size, 3]."""
    height, width = pixels.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    if side < size:
        square = np.full((side, side), rgbx_pixel(colour))
        square[top : top + height, left : left + width] = pixels
        return resize(square, size, size)
    # The horizontal pass does not change rows of one colour: only the image's own rows go through it.
    across = np.empty((side, 3 * size), np.uint8)
    across[:top] = across[top + height :] = np.tile(np.array(colour, np.uint8), size)
    own = across[top : top + height]
    _reduce_columns(pixels, side, rgbx_pixel(colour), *_weights(side, size), own)
    return _reduce_rows(across, size)


def _reduce_rows(pixels: np.ndarray, height: int) -> np.ndarray:
    """Does the vertical pass, from uint8 [h, 3 * w] to [height, w, 3]."""
    out = np.empty((height, pixels.shape[1]), np.uint8)
    _weigh_rows(pixels, *_weights(len(pixels), height), out)
    return out.reshape(height, -1, 3)


@functools.lru_cache(maxsize=1024)
def _weights(size: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for every target row, the first row that it depends on, and the weights of that and the next ones.

    Args:
      size: number of rows.
      target: number of rows that they become.

    Returns:
      int64 [target], and int32 [target, n] with n a multiple of `TAPS`: fixed-point weights, zeros after the last.
    """
    scale = size / target
    stretch = max(scale, 1.0)
    centre, support = (np.arange(target) + 0.5) * scale, 2 * stretch
    first = np.maximum((centre - support + 0.5).astype(int), 0)
    count = np.minimum((centre + support + 0.5).astype(int), size) - first
    tap = np.arange(-(-count.max() // TAPS) * TAPS)
    x = np.abs((tap + first[:, None] - centre[:, None] + 0.5) / stretch)
    near, far = ((_A + 2) * x - (_A + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * _A
    weights = np.where(tap < count[:, None], np.where(x < 1, near, np.where(x < 2, far, 0.0)), 0.0)
    weights = weights / weights.sum(1, keepdims=True) * 2**PRECISION_BITS
    return first, np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)


@numba.njit(nogil=True, cache=True)
def _weigh_rows(rows, first, weights, out):  # type: ignore[no-untyped-def]
    last = len(rows) - 1  # a row after it has weight 0: any other may stand for it
    total = np.empty(rows.shape[1], np.int32)
    for i in range(len(out)):
        total[:] = 1 << (PRECISION_BITS - 1)
        for tap in range(0, weights.shape[1], TAPS):
            row, w = first[i] + tap, weights[i, tap : tap + TAPS]
            a, b = rows[min(row, last)], rows[min(row + 1, last)]
            c, d = rows[min(row + 2, last)], rows[min(row + 3, last)]
            e, f = rows[min(row + 4, last)], rows[min(row + 5, last)]
            g, h = rows[min(row + 6, last)], rows[min(row + 7, last)]
            w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
            for x in range(len(total)):
                total[x] += (
                    np.int32(a[x]) * w0 + np.int32(b[x]) * w1 + np.int32(c[x]) * w2 + np.int32(d[x]) * w3
                    + np.int32(e[x]) * w4 + np.int32(f[x]) * w5 + np.int32(g[x]) * w6 + np.int32(h[x]) * w7
                )
        for x in range(len(total)):
            out[i, x] = min(max(total[x] >> PRECISION_BITS, 0), 255)


@numba.njit(nogil=True, cache=True)
def _reduce_columns(pixels, side, ground, first, weights, out):  # type: ignore[no-untyped-def]
    """Does the horizontal pass, by the vertical one on transposed strips of rows.

    Args:
      pixels: uint32 [h, w], of four bytes each.
      side: width of the ground that they are in the middle of.
      ground: uint32, its colour.
      first: see `_weights`, of `side`.
      weights: see `_weights`.
      out: uint8 [h, 3 * new width].
    """
    width, left = pixels.shape[1], (side - pixels.shape[1]) // 2
    strip = np.full((side, STRIP), ground, np.uint32)
    turned = strip[left : left + width]
    reduced = np.empty((len(first), STRIP), np.uint32)
    for top in range(0, len(pixels), STRIP):
        rows = pixels[top : top + STRIP]
        _turn(rows, turned.view(np.uint64))
        _weigh_rows(strip.view(np.uint8), first, weights, reduced.view(np.uint8))
        for y in range(len(rows)):
            row = out[top + y]
            for x in range(len(first)):
                pixel = reduced[x, y]
                row[3 * x] = pixel
                row[3 * x + 1] = pixel >> 8
                row[3 * x + 2] = pixel >> 16


@numba.njit(nogil=True, cache=True)
def _turn(rows, pairs):  # type: ignore[no-untyped-def]
    """Transposes a strip.

    Args:
      rows: uint32 [up to STRIP, w].
      pairs: uint64 [w, STRIP / 2], the transposed strip, two pixels at a time; the last row stands for missing ones.
    """
    last, half = len(rows) - 1, np.uint64(32)
    for y in range(0, STRIP, 4):
        a, b = rows[min(y, last)], rows[min(y + 1, last)]
        c, d = rows[min(y + 2, last)], rows[min(y + 3, last)]
        for x in range(len(pairs)):
            pairs[x, y // 2] = a[x] | (np.uint64(b[x]) << half)
            pairs[x, y // 2 + 1] = c[x] | (np.uint64(d[x]) << half)
