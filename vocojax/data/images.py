"""Images from files to the square uint8 pixels that the vision tower takes; normalisation happens on the device."""

import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from vocojax.models.clip import CLIP_MEAN

Fit = Literal["pad", "crop"]
MEAN_COLOUR = tuple(int(mean * 255) for mean in CLIP_MEAN)


class ImageError(ValueError):
    """An image that can't be used; `reason` is a short key to count it under."""

    def __init__(self, name: str, problem: str, reason: str):
        self.reason = reason
        super().__init__(f"image {name!r}: {problem}")


def load_image(path: str | Path, size: int, fit: Fit = "pad") -> np.ndarray:
    """Reads an image file and prepares it; see `prepare`.

    Raises:
      ImageError: the file is missing, empty, truncated or no image.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(str(path), f"cannot be read: {error.strerror}", "missing image") from error
    return prepare(decode(content, str(path)), size, fit)


def decode(content: bytes, name: str) -> Image.Image:
    """Encoded bytes -> an RGB image. `name` is used in errors."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ImageError(name, f"has too many pixels: {error}", "too many pixels") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError) as error:
        raise ImageError(name, f"cannot be decoded: {error}", "undecodable image") from error


def prepare(image: Image.Image, size: int, fit: Fit = "pad") -> np.ndarray:
    """An RGB image -> uint8 [size, size, 3], as CLIP's processor and LLaVA's padding do it.

    `pad` centres the image on a square of CLIP's mean colour and keeps all of it (LLaVA-1.5); `crop` keeps the centre
    square (CLIP). The shortest side is resized to `size` by bicubic interpolation.
    """
    if fit == "pad" and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), MEAN_COLOUR)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    shortest = min(image.size)
    if shortest != size:
        width, height = (max(size, int(size * edge / shortest)) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)), np.uint8)
