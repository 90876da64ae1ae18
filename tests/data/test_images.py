import io

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from vocojax.data.images import MEAN_COLOUR, ImageError, decode, load_image, prepare


def photo(width, height, seed=0):
    """A smooth picture with edges, so that resampling matters."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin((x * (c + 1) + y * (2 - c) + seed) / 17) for c in range(3)]
    pixels = np.stack(waves, -1)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 90)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (336, 336), (100, 90), (337, 500)])
def test_crop_is_the_clip_processor_of_transformers(size):
    processor = CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_normalize=False, do_rescale=False
    )
    expected = np.asarray(processor(photo(*size), return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    difference = np.abs(prepare(photo(*size), 336, "crop").astype(int) - np.rint(expected).astype(int))
    assert difference.max() <= 1


def test_pad_centres_on_the_mean_colour():
    image = Image.new("RGB", (64, 32), (255, 255, 255))
    square = prepare(image, 64, "pad")
    assert square.shape == (64, 64, 3) and square.dtype == np.uint8
    assert MEAN_COLOUR == (122, 116, 104)
    assert (square[:16] == MEAN_COLOUR).all() and (square[48:] == MEAN_COLOUR).all() and (square[16:48] == 255).all()


def encoded(image, format):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def test_modes_become_rgb():
    for mode in ("L", "CMYK", "P", "RGBA", "1"):
        format = "JPEG" if mode == "CMYK" else "PNG"
        assert decode(encoded(Image.new(mode, (8, 8)), format), "x").mode == "RGB"


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_undecodable_images_are_named(tmp_path, content):
    content = encoded(photo(64, 64), "PNG")[:200] if content is None else content
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"bad\.png': cannot be decoded") as error:
        load_image(tmp_path / "bad.png", 32)
    assert error.value.reason == "undecodable image"


def test_missing_image_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"none\.png': cannot be read: No such file") as error:
        load_image(tmp_path / "none.png", 32)
    assert error.value.reason == "missing image"
