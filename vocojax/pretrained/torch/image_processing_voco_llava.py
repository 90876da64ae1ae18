"""Images as the model was trained with them: square, uint8, by Pillow's bicubic interpolation.

An image is one unit, or with `anyres` several: itself and its tiles. Pixels are normalised by the model.
"""

import math
import os
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, load_image

FITS = ("pad", "pad_white", "crop", "square", "anyres")
_MEAN_COLOUR = tuple(int(mean * 255) for mean in OPENAI_CLIP_MEAN)
_WHITE = (255, 255, 255)
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
# LLaVA-1.6's grids of tiles, (rows, columns), in the order in which ties are decided.
_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray


def open_image(source: ImageSource) -> Image.Image:
    """Returns an image in RGB.

    EXIF's orientation is not applied, as in training. Transparency is dropped. Greyscale deeper than 8 bits: see
    `_deep_grey`.

    Args:
      source: a file, a web address, an image, or an array uint8 [H, W, 3].

    Raises:
      ValueError: it is none of these.
    """
    if isinstance(source, str) and (source.startswith(("http://", "https://", "data:"))):
        image = load_image(source)
    elif isinstance(source, str | os.PathLike):
        image = Image.open(Path(source))
    elif isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 3:
        image = Image.fromarray(source)
    elif isinstance(source, Image.Image):
        image = source
    else:
        raise ValueError(f"an image must be a path, a web address, a PIL image or an array uint8 [H, W, 3], got "
                         f"{type(source).__name__}")
    if image.mode.startswith(("I", "F")):  # Pillow would clip them at 255
        return _deep_grey(image).convert("RGB")
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Returns a greyscale image of more than 8 bits as one of 8 bits.

    Up to 16 bits, the format says how many there are, and the upper 8 are kept. 32-bit integers and floats have no
    agreed white: it is the first of 1 (floats only), 255, 65,535 and the largest 32-bit integer that no value exceeds.
    """
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image)  # tags: of a TIFF
    if image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I"):
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]  # 12 in some
        grey = (values.clip(0, 2**bits - 1) >> (bits - 8)).astype(np.uint8)
    else:
        signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
        if image.mode == "I" and not signed:
            values = values.view(np.uint32)  # Pillow reads them as signed
        values = np.nan_to_num(values.astype(np.float64), posinf=np.inf, neginf=0)
        whites = [1.0] * (image.mode == "F") + [255.0, 65535.0, 2.0**31 - 1 if signed else 2.0**32 - 1]
        white = next((white for white in whites if values.max() <= white), None)
        if white is None:
            raise ValueError(f"the image has values up to {values.max():g}: save it with 8 or 16 bits")
        grey = np.rint(values.clip(0) * (255 / white)).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey)  # 0: the lowest value is white


def prepare_units(image: Image.Image, size: int, fit: str) -> list[np.ndarray]:
    """Makes all units of an image.

    Args:
      image: an RGB image.
      size: side of a unit, in pixels.
      fit: how it becomes square. `pad` puts all of it in the middle of a square of CLIP's mean colour (LLaVA-1.5),
        `pad_white` of a white one (Shikra); `crop` keeps the middle square (CLIP); `square` changes the aspect ratio;
        `anyres` makes the whole image as with `square`, and then tiles (LLaVA-1.6).

    Returns:
      uint8 [size, size, 3] for each unit.

    Raises:
      ValueError: the fit is unknown.
    """
    if fit == "anyres":
        return [_resized(image, size, size), *_tiles(image, size)]
    if fit == "square":
        return [_resized(image, size, size)]
    if fit == "crop":
        return [_cropped(image, size)]
    if fit in ("pad", "pad_white"):
        return [_resized(_padded(image, _WHITE if fit == "pad_white" else _MEAN_COLOUR), size, size)]
    raise ValueError(f"fit must be one of {list(FITS)}, got {fit!r}")


def _resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _padded(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _cropped(image: Image.Image, size: int) -> np.ndarray:
    shortest = min(image.size)
    width, height = (max(size, int(size * edge / shortest)) for edge in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return _resized(image, width, height)[top : top + size, left : left + size]


def _tiles(image: Image.Image, size: int) -> list[np.ndarray]:
    """Cuts tiles, row by row, out of a black ground with the image in its middle."""
    rows, columns = _grid(image.width, image.height, size)
    scale_x, scale_y = columns * size / image.width, rows * size / image.height
    if scale_x < scale_y:
        width, height = columns * size, min(math.ceil(image.height * scale_x), rows * size)
    else:
        width, height = min(math.ceil(image.width * scale_y), columns * size), rows * size
    ground = np.zeros((rows * size, columns * size, 3), np.uint8)
    top, left = (rows * size - height) // 2, (columns * size - width) // 2
    ground[top : top + height, left : left + width] = _resized(image, width, height)
    return list(ground.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3))


def _grid(width: int, height: int, size: int) -> tuple[int, int]:
    """Returns the grid for an image, (rows, columns): it keeps most pixels, and then wastes fewest."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * size / width, rows * size / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - rows * columns * size * size

    return max(_GRIDS, key=merit)
