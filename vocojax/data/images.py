"""Images from files to the square uint8 pixels that the vision tower takes; normalisation happens on the device.

Pixels are those of transformers' CLIP processor on Pillow. JPEG's reduced decoding ("draft") would be faster for large
files and is not used, since it gives other pixels.
"""

import io
import math
import os
import re
import stat
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from vocojax.data.jpeg import decode_jpeg, jpeg_size
from vocojax.data.picture_files import too_many_scans, without_notes
from vocojax.data.resampling import resize, resize_padded
from vocojax.data.rgbx import as_image, rgbx
from vocojax.errors import InputError, VocojaxError, shown
from vocojax.models.clip import CLIP_MEAN

Fit = Literal["pad", "pad_white", "crop", "square", "anyres"]
MEAN_COLOUR = tuple(int(mean * 255) for mean in CLIP_MEAN)
WHITE = (255, 255, 255)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no format that runs another program
MAX_PIXELS = 2**27  # 11,585 x 11,585; four bytes each while an image is decoded
MAX_ASPECT = 200  # longer side to shorter one: `crop` enlarges the shorter one to the tower's size
MAX_BYTES = 2**28
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
# LLaVA-1.6's grids of tiles, (rows, columns), in the order in which ties are decided.
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


class ImageError(VocojaxError, ValueError):
    """An image that can't be used.

    Attributes:
      reason: a short key to count it under.
    """

    def __init__(self, name: str, problem: str, reason: str):
        self.reason = reason
        super().__init__(f"image {shown(name)}: {problem}")


class VideoError(ImageError):
    """A video that can't be used.

    Attributes:
      reason: a short key to count it under.
    """

    def __init__(self, name: str, problem: str, reason: str):
        super().__init__(name, problem, reason)
        self.args = (f"video {shown(name)}: {problem}",)


def load_image(image: str | Path | bytes, size: int, fit: Fit = "pad") -> np.ndarray:
    """Reads an image and prepares it, see `prepare`.

    Args:
      image: a file, or its content.
      size: side of the result, in pixels.
      fit: how it becomes square.

    Returns:
      uint8 [size, size, 3].

    Raises:
      ImageError: the file is missing, empty, truncated, too large or not an image.
    """
    content, name = (image, "of a record") if isinstance(image, bytes) else (read(image), str(image))
    return prepare(decode(content, name), size, fit)


def read(path: str | Path) -> bytes:
    """Reads the content of an image file.

    Raises:
      ImageError: it can't be read, is a URL, is not a regular file, or is larger than `MAX_BYTES`.
    """
    if re.match(r"(https?|ftp|data):", str(path)):
        raise ImageError(str(path)[:200], "is a URL, and nothing is downloaded: pass a file, its bytes, or a PIL "
                         "image", "missing image")
    try:
        status = os.stat(path)  # opening a pipe would wait for its writer
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(str(path), "is not a file", "missing image")
        if status.st_size > MAX_BYTES:
            raise ImageError(str(path), f"has {status.st_size} bytes, more than {MAX_BYTES}", "too many bytes")
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a path that no system call takes
        if isinstance(error, ImageError):
            raise
        raise ImageError(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}",
                         "missing image") from error


def decode(content: bytes, name: str) -> Image.Image:
    """Decodes an image to RGB.

    EXIF's orientation is not applied, as in the code that LLaVA and VoCo-LLaMA were trained with. Of several
    pictures in a file, the first is read.

    Args:
      content: the content of the file.
      name: names the image in errors.

    Raises:
      ImageError: it is empty, truncated, not an image, or (checked before decoding) above `MAX_PIXELS` or `MAX_ASPECT`,
        or a JPEG of too many scans.
    """
    return as_image(_pixels(content, name))


def decode_units(content: bytes, name: str, size: int, fit: Fit = "pad") -> tuple[np.ndarray, ...]:
    """Decodes an image and makes all of its units, as `decode` and `prepare_units` do, in less time."""
    return _units(_pixels(content, name), size, fit)


def _pixels(content: bytes, name: str) -> np.ndarray:
    """Decodes an image, see `decode`, to the form of `rgbx`."""
    size = jpeg_size(content)
    if size and not _problem(content, *size) and (pixels := decode_jpeg(content, size)) is not None:
        return pixels
    with _open(content, name) as image:
        return rgbx(to_rgb(image, name))


def to_rgb(image: Image.Image, name: str = "in memory") -> Image.Image:
    """Returns an image as RGB. Transparency is dropped; greyscale deeper than 8 bits: see `_deep_grey`.

    Args:
      image: of any mode.
      name: names the image in errors.

    Raises:
      ImageError: it is truncated, above `MAX_PIXELS` or `MAX_ASPECT`, or its values have no known white.
    """
    if problem := too_large(*image.size):
        raise ImageError(name, problem, "too many pixels")
    try:
        if image.mode.startswith(("I", "F")):  # Pillow would clip them at 255
            return _deep_grey(image, name).convert("RGB")
        if image.mode == "RGB":
            image.load()
            return image
        return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # a damaged file may make a decoder raise anything
        raise ImageError(name, f"cannot be decoded: {error}", "undecodable image") from error


def _deep_grey(image: Image.Image, name: str) -> Image.Image:
    """Returns a greyscale image of more than 8 bits as one of 8 bits.

    Up to 16 bits, the format says how many there are, and the upper 8 are kept. 32-bit integers and floats have no
    agreed white: it is the first of 1 (floats only), 255, 65,535 and the largest 32-bit integer that no value exceeds.
    """
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image)  # tags: of a TIFF
    if image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I"):
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]  # 12 in some
        grey = (values.clip(0, 2**bits - 1) >> (bits - 8)).astype(np.uint8)
    else:
        signed = tags.get(SAMPLE_FORMAT, (1,))[0] == 2
        if image.mode == "I" and not signed:
            values = values.view(np.uint32)  # Pillow reads them as signed
        values = np.nan_to_num(values.astype(np.float64), posinf=np.inf, neginf=0)
        whites = [1.0] * (image.mode == "F") + [255.0, 65535.0, 2.0**31 - 1 if signed else 2.0**32 - 1]
        white = next((white for white in whites if values.max() <= white), None)
        if white is None:
            raise ImageError(name, f"has values up to {values.max():g}: save it with 8 or 16 bits", "undecodable image")
        grey = np.rint(values.clip(0) * (255 / white)).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == 0 else grey)  # 0: the lowest value is white


def pixel_size(content: bytes, name: str) -> tuple[int, int]:
    """Returns width and height, read only from the header.

    Raises:
      ImageError: as `decode`.
    """
    with _open(content, name) as image:
        return image.size


def _open(content: bytes, name: str) -> ImageFile.ImageFile:
    if not content:
        raise ImageError(name, "cannot be decoded: it is empty", "undecodable image")
    try:
        image = Image.open(io.BytesIO(without_notes(content)), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(name, f"has too many pixels: {error}", "too many pixels") from error
    except UnidentifiedImageError as error:
        raise ImageError(name, "cannot be decoded: not an image of a known format", "undecodable image") from error
    except Exception as error:
        raise ImageError(name, f"cannot be decoded: {error}", "undecodable image") from error
    if found := _problem(content, *image.size):
        raise ImageError(name, *found)
    return image


def _problem(content: bytes, width: int, height: int) -> tuple[str, str] | None:
    """Returns why an image of this size must not be decoded, and a short key for it; None if it may be."""
    if problem := too_large(width, height):
        return problem, "too many pixels"
    if problem := too_many_scans(content, width * height):
        return problem, "too many scans"
    return None


def too_large(width: int, height: int) -> str:
    """Returns what is wrong with an image of this size if it, or what a fit makes of it, is too large; or ''."""
    if width * height > MAX_PIXELS:
        return f"has {width} x {height} pixels, more than {MAX_PIXELS}: make it smaller"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"has {width} x {height} pixels, sides of more than {MAX_ASPECT} to 1"
    return ""


def prepare(image: Image.Image, size: int, fit: Fit = "pad") -> np.ndarray:
    """Makes an image square, as CLIP's processor and LLaVA's padding do, by bicubic interpolation.

    Args:
      image: an RGB image.
      size: side of the result, in pixels.
      fit: `pad` puts all of the image in the middle of a square of CLIP's mean colour (LLaVA-1.5), `pad_white` of a
        white one (Shikra); `crop` keeps the middle square (CLIP); `square` changes the aspect ratio.

    Returns:
      uint8 [size, size, 3].

    Raises:
      InputError: the fit is `anyres`, which makes several units: use `prepare_units`.
    """
    if fit == "anyres":
        raise InputError("'anyres' makes several units of an image: use prepare_units")
    return _units(rgbx(image), size, fit)[0]


def prepare_units(image: Image.Image, size: int, fit: Fit = "pad") -> tuple[np.ndarray, ...]:
    """Makes all units of an image.

    There is one, see `prepare`, except with `anyres` (LLaVA-1.6): first the whole image as with `square`, then the
    tiles, row by row, of the image in the middle of a black ground as large as the grid that suits it best.

    Args:
      image: an RGB image.
      size: side of a unit, in pixels.
      fit: how the image becomes square units.

    Returns:
      uint8 [size, size, 3] for each unit.
    """
    return _units(rgbx(image), size, fit)


def _units(pixels: np.ndarray, size: int, fit: Fit) -> tuple[np.ndarray, ...]:
    """Makes all units of an image, see `prepare_units`, in the form of `rgbx`."""
    if fit == "anyres":
        return _tiles(pixels, size)
    if fit == "square":
        return (resize(pixels, size, size),)
    height, width = pixels.shape
    if fit != "crop" and width != height:
        return (resize_padded(pixels, size, WHITE if fit == "pad_white" else MEAN_COLOUR),)
    shortest = min(width, height)
    width, height = (max(size, int(size * edge / shortest)) for edge in (width, height))
    left, top = (width - size) // 2, (height - size) // 2
    return (resize(pixels, width, height)[top : top + size, left : left + size],)


def _tiles(pixels: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    own_height, own_width = pixels.shape
    rows, columns = choose_grid(own_width, own_height, size)
    scale_x, scale_y = columns * size / own_width, rows * size / own_height
    if scale_x < scale_y:
        width, height = columns * size, min(math.ceil(own_height * scale_x), rows * size)
    else:
        width, height = min(math.ceil(own_width * scale_y), columns * size), rows * size
    ground = np.zeros((rows * size, columns * size, 3), np.uint8)
    top, left = (rows * size - height) // 2, (columns * size - width) // 2
    ground[top : top + height, left : left + width] = resize(pixels, width, height)
    tiles = ground.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    return (resize(pixels, size, size), *tiles)


def prepare_frame(image: Image.Image, size: int, fit: Fit = "pad") -> np.ndarray:
    """Makes a video's frame one unit; with `anyres` it has no tiles and is prepared as with `square`."""
    return prepare(image, size, "square" if fit == "anyres" else fit)


def count_units(width: int, height: int, size: int, fit: Fit) -> int:
    """Returns how many units `prepare_units` makes from an image of this width and height."""
    if fit != "anyres":
        return 1
    rows, columns = choose_grid(width, height, size)
    return 1 + rows * columns


def choose_grid(width: int, height: int, size: int) -> tuple[int, int]:
    """Returns LLaVA-1.6's grid for an image, (rows, columns): it keeps most pixels, and then wastes fewest."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * size / width, rows * size / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - rows * columns * size * size

    return max(GRIDS, key=merit)
