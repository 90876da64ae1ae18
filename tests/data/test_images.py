import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor, LlavaNextImageProcessor

from vocojax.data import images
from vocojax.data.images import (
    GRIDS,
    MEAN_COLOUR,
    ImageError,
    choose_grid,
    count_units,
    decode,
    load_image,
    prepare,
    prepare_units,
    too_large,
)
from vocojax.data.jpeg import decode_jpeg
from vocojax.data.resampling import resize
from vocojax.data.rgbx import as_image, rgbx


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


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
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


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 900), (900, 300), (336, 336), (50, 90), (337, 500)])
@pytest.mark.parametrize("kind", ["photo", "noise"])
def test_fits_are_those_of_pillow_to_the_bit(size, kind):
    image = photo(*size)
    if kind == "noise":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 2, (size[1], size[0], 3), np.uint8) * 255)
    side = max(size)
    for fit, colour in (("pad", MEAN_COLOUR), ("pad_white", (255, 255, 255))):
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
        assert np.array_equal(prepare(image, 224, fit), square.resize((224, 224), Image.Resampling.BICUBIC)), fit
    assert np.array_equal(prepare(image, 224, "square"), image.resize((224, 224), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(700, 30), (30, 700), (90, 61), (64, 31), (33, 65)])
def test_a_padded_image_is_never_in_memory_as_a_whole(size):
    """Images of more than 8,192 pixels a side have squares of hundreds of megabytes; it is padded strip by strip."""
    image, side = photo(*size), max(size)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    expected = square.resize((28, 28), Image.Resampling.BICUBIC)
    assert too_large(9000, 9000) == too_large(60000, 1000) == ""
    assert np.array_equal(load_image(encoded(image, "PNG"), 28), expected)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 120)] * 4), st.integers(0, 9))
def test_every_resize_is_pillow_s(sizes, seed):
    width, height, new_width, new_height = sizes
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    expected = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    assert np.array_equal(resize(rgbx(image), new_width, new_height), expected)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 900), (900, 300), (336, 336), (200, 90)])
def test_anyres_is_the_llava_next_processor_of_transformers(size):
    grids = [[rows * 224, columns * 224] for rows, columns in GRIDS]
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}, image_grid_pinpoints=grids,
        do_normalize=False, do_rescale=False,
    )
    expected = np.asarray(processor(photo(*size), return_tensors="np")["pixel_values"][0]).transpose(0, 2, 3, 1)
    units = prepare_units(photo(*size), 224, "anyres")
    assert len(units) == len(expected) == count_units(*size, 224, "anyres")
    assert np.abs(np.stack(units).astype(int) - np.rint(expected).astype(int)).max() <= 1


def test_grids_literally():
    assert choose_grid(1000, 1000, 336) == (2, 2)
    assert choose_grid(2000, 500, 336) == (1, 3)
    assert choose_grid(600, 300, 336) == (1, 2)
    assert choose_grid(300, 1000, 336) == (3, 1)
    with pytest.raises(ValueError, match="use prepare_units"):
        prepare(photo(8, 8), 8, "anyres")


def test_colours_survive_every_mode():
    """Pure red through each mode that files come in."""
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    palette = red.quantize(4)
    palette.info["transparency"] = bytes([255, 0, 255, 255])
    for image, format in ((red.convert("CMYK"), "JPEG"), (palette, "PNG"), (red.convert("RGBA"), "WEBP"), (red, "BMP"),
                          (red, "TIFF"), (red.quantize(4), "GIF"), (red, "MPO")):
        pixel = np.asarray(decode(encoded(image, format), "x"))[4, 4].astype(int)
        assert np.abs(pixel - (255, 0, 0)).max() <= 3, (image.mode, format)


def test_sixteen_bit_greyscale_keeps_its_upper_bits():
    deep = Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16))
    assert np.asarray(decode(encoded(deep, "PNG"), "x"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def tiff(bits, sample_format, values, photometric=1):
    """A file of three grey pixels; Pillow writes no unsigned 32-bit, signed 16-bit, 12-bit or inverted one."""
    tags = [(256, 3), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 134), (277, 1), (278, 1),
            (279, len(values)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + values


@pytest.mark.parametrize(
    ("content", "grey"),
    [
        (tiff(32, 1, struct.pack("<3I", 0, 100, 255)), [0, 100, 255]),
        (tiff(32, 1, struct.pack("<3I", 0, 32768, 65535)), [0, 128, 255]),
        (tiff(32, 1, struct.pack("<3I", 0, 2**31, 2**32 - 1)), [0, 128, 255]),
        (tiff(32, 2, struct.pack("<3i", -5, 2**30, 2**31 - 1)), [0, 128, 255]),
        (tiff(16, 2, struct.pack("<3h", -5, 100, 255)), [0, 100, 255]),
        (tiff(32, 3, struct.pack("<3f", 0, 0.5, 1)), [0, 128, 255]),
        (tiff(32, 3, struct.pack("<3f", float("nan"), 100, 255)), [0, 100, 255]),
        (tiff(32, 3, struct.pack("<3f", -1, 256, 65535)), [0, 1, 255]),
        (tiff(16, 1, struct.pack("<3H", 255, 256, 65535)), [0, 1, 255]),
        (tiff(12, 1, bytes([0x00, 0x08, 0x00, 0xFF, 0xF0])), [0, 128, 255]),
        (tiff(16, 1, struct.pack("<3H", 0, 32768, 65535), photometric=0), [255, 127, 0]),
        (b"P5 3 1 65535\n" + struct.pack(">3H", 0, 256, 65535), [0, 1, 255]),
    ],
)
def test_deep_greyscale_is_never_just_black(content, grey):
    assert np.asarray(decode(content, "x"))[0].tolist() == [[value] * 3 for value in grey]


def test_floats_without_a_white_are_refused():
    with pytest.raises(ImageError, match="has values up to inf: save it with 8 or 16 bits") as error:
        decode(tiff(32, 3, struct.pack("<3f", 0, 1, float("inf"))), "x")
    assert error.value.reason == "undecodable image"


NOTE = zlib.compress(bytes(3_000_000))


@pytest.mark.parametrize(
    "chunk", [b"iCCPmonitor\0\0" + NOTE, b"zTXtworkflow\0\0" + NOTE, b"iTXtXMP\0\1\0\0\0" + NOTE,
              b"tEXtprompt\0" + bytes(3_000_000)], ids=["profile", "packed text", "XMP", "text"])
def test_notes_in_a_png_do_not_matter(chunk):
    """Megabytes of them, between the header and the pixels and after the pixels."""
    png = encoded(photo(20, 10), "PNG")
    note = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert np.array_equal(decode(png[:33] + note + png[33:-12] + note + png[-12:], "x"), photo(20, 10))


def with_empty_scans(size, count):
    """A progressive JPEG whose last scan, with the table before it, is there so many times more."""
    content = encoded(Image.new("RGB", size), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xc4")
    return content[:-2] + content[last:-2] * count + content[-2:]


@pytest.mark.parametrize(
    ("size", "count", "problem"), [((8, 8), 400, ""), ((8, 8), 600, "500"), ((4096, 4096), 200, "128")])
def test_scans_of_a_jpeg_are_limited(size, count, problem):
    content = with_empty_scans(size, count)
    if not problem:
        assert decode(content, "x").size == size
        return
    with pytest.raises(ImageError, match=f"is a JPEG of more than {problem} scans: save it again") as error:
        decode(content, "x")
    assert error.value.reason == "too many scans"


def test_what_looks_like_a_scan_elsewhere_is_none():
    """In an application's segment, and in a second picture after the first."""
    jpeg = encoded(photo(16, 16), "JPEG")
    segment = b"\xff\xd8\xff\xec" + struct.pack(">H", 60002) + b"\xff\xda" * 30000
    assert np.array_equal(decode(segment + jpeg[2:] + jpeg * 600, "x"), decode(jpeg, "x"))


JPEGS = {
    "4:2:0": {"quality": 75, "subsampling": "4:2:0"}, "4:2:2": {"quality": 90, "subsampling": "4:2:2"},
    "4:4:4": {"quality": 97, "subsampling": "4:4:4"}, "RGB": {"keep_rgb": True}, "coarse": {"quality": 5},
    "progressive": {"progressive": True}, "progressive 4:4:4": {"progressive": True, "subsampling": "4:4:4"},
    "restarts": {"restart_marker_blocks": 3}, "optimized": {"optimize": True},
    "notes": {"comment": b"note", "icc_profile": bytes(70000), "exif": b"Exif\0\0" + bytes(20)},
}


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 16), (17, 33), (130, 97)])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_has_pillow_s_pixels(mode, options, size):
    noise = np.random.default_rng(0).integers(0, 80, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(np.asarray(photo(*size)) // 2 + noise).convert(mode)
    content = encoded(image, "JPEG", **{name: value for name, value in options.items() if mode == "RGB" or name not in (
        "subsampling", "keep_rgb")})
    fast = decode_jpeg(content, size)
    assert fast is not None and fast.shape == size[::-1]
    with Image.open(io.BytesIO(content)) as pillows:
        assert np.array_equal(as_image(fast), pillows.convert("RGB"))
    assert np.array_equal(decode(content, "x"), as_image(fast))


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_no_cut_jpeg_is_filled_with_grey(options):
    """Wherever it is cut: Pillow decides, which takes a file without its end marker and refuses all others."""
    content = encoded(photo(64, 48), "JPEG", **options)
    whole = as_image(decode_jpeg(content, (64, 48)))
    for length in {*range(0, len(content), 97), *range(len(content) - 4, len(content))}:
        assert decode_jpeg(content[:length], (64, 48)) is None
        try:
            with Image.open(io.BytesIO(content[:length])) as image:
                expected = np.asarray(image.convert("RGB"))
        except OSError:
            with pytest.raises(ImageError, match="cannot be decoded") as error:
                decode(content[:length], "x")
            assert error.value.reason == "undecodable image"
        else:
            assert length >= len(content) - 2 and np.array_equal(expected, whole)
            assert np.array_equal(decode(content[:length], "x"), expected)


def test_a_jpeg_that_simplejpeg_refuses_or_that_is_not_rgb_is_pillow_s():
    """A damaged one, one whose header says another size, one of four colours, one of several pictures."""
    content, four = encoded(photo(40, 30), "JPEG"), encoded(photo(40, 30).convert("CMYK"), "JPEG")
    scan = content.index(b"\xff\xda") + 14
    damaged = content[: scan + 20] + b"\x55\xaa" * 5 + content[scan + 30 :]
    assert decode_jpeg(content, (30, 40)) is None and decode_jpeg(damaged, (40, 30)) is None
    for case in (damaged, four, encoded(photo(40, 30), "MPO", save_all=True, append_images=[photo(8, 8)])):
        with Image.open(io.BytesIO(case)) as image:
            assert np.array_equal(decode(case, "x"), image.convert("RGB"))


def test_decoded_jpegs_do_not_share_memory():
    """The second one may be decoded while the first is still used."""
    first, second = (decode(encoded(Image.new("RGB", (16, 16), (grey,) * 3), "JPEG"), "x") for grey in (10, 200))
    assert first.getpixel((3, 3)) == (10, 10, 10) and second.getpixel((3, 3)) == (200, 200, 200)


def test_exif_orientation_is_left_alone():
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    photo(40, 20).save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue(), "x").size == (40, 20)


def test_bombs_are_found_before_they_are_decoded(monkeypatch):
    content = encoded(photo(64, 64), "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(ImageError, match="has 64 x 64 pixels, more than 4095") as error:
        decode(content, "x")
    assert error.value.reason == "too many pixels"


@pytest.mark.parametrize("size", [(100, 65000), (65000, 100), (11586, 11586), (1, 201), (201, 1)])
def test_shapes_that_a_fit_would_blow_up_are_refused(size):
    """A side of one pixel would be enlarged with the other."""
    with pytest.raises(ImageError, match=f"has {size[0]} x {size[1]} pixels") as error:
        decode(encoded(Image.new("1", size), "PNG"), "x")
    assert error.value.reason == "too many pixels"


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (20, 3000), (3000, 20)])
def test_long_and_tiny_images_are_prepared_by_every_fit(size):
    for fit in ("pad", "pad_white", "crop", "square", "anyres"):
        image = decode(encoded(photo(*size), "PNG"), "x")
        assert all(unit.shape == (28, 28, 3) for unit in prepare_units(image, 28, fit)), fit


def test_only_regular_files_of_limited_size_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    for name, reason in (("pipe", "missing image"), ("", "missing image"), ("large", "too many bytes"),
                         ("a\0b", "missing image"), ("n" * 300, "missing image")):
        with pytest.raises(ImageError) as error:
            load_image(f"{tmp_path}/{name}", 8)
        assert error.value.reason == reason


@pytest.mark.parametrize(("width", "height"), [(31, 32), (32, 31), (63, 64), (64, 63), (33, 64)])
def test_an_image_that_is_one_pixel_from_square_is_padded_too(width, height):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    side = max(width, height)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    np.testing.assert_array_equal(prepare(image, 32), square.resize((32, 32), Image.Resampling.BICUBIC))
