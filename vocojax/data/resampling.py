"""Pillow's bicubic reduction of 8-bit RGB images, bit for bit, several times as fast and without the interpreter lock.

Pillow's own loops are scalar. Here both passes run over whole rows of memory (the horizontal one on the transposed
image), which a compiler turns into vector instructions; the arithmetic is Pillow's: weights of 22 bits, sums in int32,
8 bits between the passes.
"""

import functools

import numba
import numpy as np
import pyarrow as pa
from PIL import Image

PRECISION_BITS = 22
_A = -0.5  # parameter of the cubic convolution


def resize(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Resizes an RGB image to uint8 [height, width, 3]; the pixels are those of Pillow's `BICUBIC`."""
    reduced_x, reduced_y = image.width - width, image.height - height
    # Pillow's horizontal pass comes first, as ours, except where rows are reduced most. Enlargements are cheap anyway.
    if min(reduced_x, reduced_y) < 0 or reduced_y >= 2 * reduced_x:
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.uint8)
    across = np.empty((image.height, width), np.uint32)
    reduce_columns(image, across)
    return reduce_rows(across, height)


def reduce_columns(image: Image.Image, out: np.ndarray) -> None:
    """Does only the horizontal pass.

    Args:
      image: an RGB image.
      out: uint32 [image.height, width]; takes the pixels, of four bytes each (Pillow's RGBX).
    """
    reduced = np.empty((out.shape[1], image.height), np.uint32)
    _reduce(_pixels(image.transpose(Image.Transpose.TRANSPOSE)), reduced)
    np.copyto(out, reduced.T)


def reduce_rows(pixels: np.ndarray, height: int) -> np.ndarray:
    """Does only the vertical pass.

    Args:
      pixels: uint32 [h, w], pixels of four bytes.
      height: rows of the result.

    Returns:
      uint8 [height, w, 3].
    """
    out = np.empty((height, pixels.shape[1]), np.uint32)
    _reduce(pixels, out)
    rgb = np.empty((*out.shape, 3), np.uint8)
    _drop_fourth(out.view(np.uint8).reshape(-1, 4), rgb.reshape(-1, 3))
    return rgb


def _pixels(image: Image.Image) -> np.ndarray:
    """Returns Pillow's own memory as uint32 [h, w], or a copy if it is not contiguous, as for large images."""
    try:
        flat = pa.array(image).flatten().to_numpy(zero_copy_only=True)
    except ValueError:
        flat = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8)
    return flat.view(np.uint32).reshape(image.height, image.width)


def _reduce(pixels: np.ndarray, out: np.ndarray) -> None:
    _weigh_rows(pixels.view(np.uint8), *_weights(len(pixels), len(out)), out.view(np.uint8))


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
def _drop_fourth(pixels, out):  # type: ignore[no-untyped-def]
    for i in range(len(pixels)):
        out[i, 0], out[i, 1], out[i, 2] = pixels[i, 0], pixels[i, 1], pixels[i, 2]
