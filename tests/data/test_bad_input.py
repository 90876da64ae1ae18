"""Several hundred damaged records and files: no exception escapes, and every one of them is used or counted."""

import copy
import dataclasses
import io
import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vocojax.data.config import DataConfig
from vocojax.data.images import ImageError, load_image
from vocojax.data.loader import BatchStream, SkippedTooMany
from vocojax.data.packing import row_shape
from vocojax.data.prepared import PreparedSource
from vocojax.data.sources import LlavaSource
from vocojax.layout import LayoutError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
STRANGE = (None, True, 0, -1, 1e300, "", " ", "\0", "\ud800", "../x", [], [[]], [None], {}, {"from": "gpt"}, "x" * 300,
           ["a"] * 9, "<image>" * 3, "<voco>", "</s>", "é😀")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def damaged_records(random):
    """Records with one or more values of any depth replaced, removed or repeated."""
    for _ in range(330):
        turns = [{"from": "human", "value": "<image>\nwhat color?"}, {"from": "gpt", "value": "red"}]
        record = {"id": str(random.integers(20)), "image": "good.png", "conversations": turns}
        for _ in range(random.integers(1, 4)):
            place = record
            while True:
                key = random.choice(list(place)) if isinstance(place, dict) else int(random.integers(len(place)))
                if isinstance(place[key], (dict, list)) and place[key] and random.random() < 0.8:
                    place = place[key]
                    continue
                break
            action = random.integers(3)
            if action == 0:
                place[key] = copy.deepcopy(STRANGE[random.integers(len(STRANGE))])
            elif action == 1:
                del place[key]
            elif isinstance(place, list):
                place.append(copy.deepcopy(place[key]))
            if not record:
                break
        yield record


def damaged_images(random, folder):
    """Records of image files of every format with bytes changed, cut off, swapped or added."""
    picture = Image.fromarray(random.integers(0, 255, (40, 50, 3), np.uint8))
    for number in range(240):
        buffer = io.BytesIO()
        picture.save(buffer, FORMATS[number % len(FORMATS)])
        content = bytearray(buffer.getvalue())
        action = number // len(FORMATS) % 5
        if action == 0:
            content = content[: random.integers(len(content))]
        elif action == 1:
            content[: random.integers(1, 40)] = random.bytes(int(random.integers(1, 40)))
        elif action == 2:
            content[4:4] = random.bytes(8)
        else:  # the header's fields are among the first bytes
            reach = 64 if action == 3 else len(content)
            for place in random.integers(0, reach, random.integers(1, 20)):
                content[place] = random.integers(256)
        (folder / f"{number}.img").write_bytes(content)
        yield record_of(f"{number}.img")
    for size in ((100, 65000), (65000, 100), (1, 65000), (65000, 1), (1, 30), (1, 1)):
        name = "{}x{}.png".format(*size)
        Image.new("1", size).save(folder / name)
        yield record_of(name)


def record_of(image):
    turns = [{"from": "human", "value": "<image>\nwhat color?"}, {"from": "gpt", "value": "red"}]
    return {"id": f"of {image}", "image": image, "conversations": turns}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, llava_data):
    root = tmp_path_factory.mktemp("damaged")
    (root / "images").mkdir()
    Image.new("RGB", (30, 20), (255, 0, 0)).save(root / "images" / "good.png")
    random = np.random.default_rng(0)
    records = [record_of("../x"), record_of("none.png"), record_of(5), record_of("good.png"), record_of("good.png")]
    for turn, key, value in ((1, "value", " "), (1, "value", "\ud800"), (0, "from", "system"),
                             (0, "value", "<image><image>")):
        records.append(record_of("good.png"))
        records[-1]["conversations"][turn][key] = value
    records.append({**record_of("good.png"), "conversations": []})
    records += [*damaged_records(random), *damaged_images(random, root / "images")]
    (root / "records.json").write_text(json.dumps(records))
    return DataConfig(
        path=str(root / "records.json"), image_root=str(root / "images"), tokenizer=str(llava_data / "tokenizer"),
        template="short", row_length=64, images_per_row=2, pack_window=8, num_threads=2, max_skipped_share=1.0,
    ), len(records)


def test_every_damaged_record_is_used_or_has_a_reason(damaged, tiny_config, words):
    data, count = damaged
    shape, outcomes = row_shape(data, 32, tiny_config.unit_tokens, "voco"), Counter()
    source = PreparedSource(LlavaSource(data.path, data.image_root), tiny_config, data, words, shape)
    assert len(source) == count >= 500
    for index in range(count):
        try:
            item = source.load(source.lay_out(index))
        except (LayoutError, ImageError) as error:
            assert error.reason and str(error)
            outcomes[error.reason] += 1
        else:
            assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in item.images)
            outcomes["used"] += 1
    assert outcomes.total() == count
    for reason in ("used", "undecodable image", "missing image", "malformed record", "unknown role", "empty answer",
                   "no conversation", "more <image> than images", "duplicate record", "not UTF-8",
                   "image outside root", "too many pixels"):
        assert outcomes[reason] > 0, reason


def test_a_stream_counts_every_damaged_record(damaged, tiny_config):
    data, count = damaged
    stream = BatchStream(tiny_config, data, 4, 0, "voco")
    while stream.tally.records < 2 * count:
        batch = next(stream)
        assert batch["images"].shape == (4, 2, 32, 32, 3) and (batch["num_tokens"] <= 64).all()
    scalars = stream.tally.scalars()
    assert scalars["data/skipped/undecodable image"] > 100 and scalars["data/records"] >= 2 * count
    stream = BatchStream(tiny_config, dataclasses.replace(data, max_skipped_share=0.01), 4, 0, "voco")
    with pytest.raises(SkippedTooMany):
        next(stream)


def test_files_outside_the_root_are_not_read(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "images").mkdir()
    (tmp_path / "mnt" / "coco").mkdir(parents=True)
    os.symlink(tmp_path / "mnt" / "coco", tmp_path / "images" / "coco")
    os.symlink("loop", tmp_path / "images" / "loop")
    names = ["../secret.png", str(tmp_path / "secret.png"), "coco/../../secret.png", "a/../../secret.png",
             "loop/x.png", "coco/../1.png"]
    (tmp_path / "x.json").write_text(json.dumps([record_of(name) for name in names]))
    source = LlavaSource(tmp_path / "x.json", tmp_path / "images")
    for index in range(4):
        with pytest.raises(LayoutError, match="leaves the image root"):
            source[index]
    with pytest.raises(ImageError):
        load_image(source[4].images[0], 8)
    assert source[5].images == (tmp_path.resolve() / "images" / "1.png",)  # not mnt/1.png, which is outside


def test_links_of_the_user_are_followed(tmp_path):
    """A linked directory, a linked file, a linked root and absolute paths through it."""
    (tmp_path / "mnt" / "coco").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mnt" / "coco" / "1.png")
    os.symlink(tmp_path / "mnt" / "coco", tmp_path / "images" / "coco")
    os.symlink(tmp_path / "mnt" / "coco" / "1.png", tmp_path / "images" / "one.png")
    os.symlink(tmp_path / "mnt", tmp_path / "root")
    names = ["coco/1.png", "one.png", "coco/1.png", str(tmp_path / "root" / "coco" / "1.png"),
             str(tmp_path / "mnt" / "coco" / "1.png")]
    for name, root in zip(names, ("images", "images", "root", "root", "root"), strict=True):
        (tmp_path / "x.json").write_text(json.dumps([record_of(name)]))
        assert load_image(LlavaSource(tmp_path / "x.json", tmp_path / root)[0].images[0], 8).shape == (8, 8, 3)
