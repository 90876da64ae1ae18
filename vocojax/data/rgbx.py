"""Images as arrays in Pillow's own form: uint32 [h, w], of the bytes red, green, blue and an unused one."""

import numpy as np
import pyarrow as pa
from PIL import Image


def rgbx(image: Image.Image) -> np.ndarray:
    """Returns an RGB image's own memory, or a copy if it is not contiguous, as for large images."""
    try:
        flat = pa.array(image).values.to_numpy(zero_copy_only=True)
    except ValueError:
        flat = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8)
    return flat.view(np.uint32).reshape(image.height, image.width)


def as_image(pixels: np.ndarray) -> Image.Image:
    """Returns the RGB image whose memory this is."""
    height, width = pixels.shape
    flat = pa.array(pixels.reshape(-1).view(np.uint8))
    return Image.fromarrow(pa.FixedSizeListArray.from_arrays(flat, 4), "RGB", (width, height))


def rgbx_pixel(colour: tuple[int, ...]) -> np.uint32:
    """Returns a colour as a pixel."""
    return np.array([*colour, 255], np.uint8).view(np.uint32)[0]
