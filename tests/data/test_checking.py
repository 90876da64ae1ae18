"""A look at all records: the bad ones are named, the figures are those of the stream, the page shows what it packs."""

import csv
import dataclasses
import io
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from vocojax.data.checking import check, first_rows, pack
from vocojax.data.loader import BatchStream
from vocojax.data.packing import Size
from vocojax.data.row_page import mask_picture, page
from vocojax.layout import Role
from vocojax.training.start import warn_of_unknown_words


@pytest.fixture
def spoiled(stage, llava_data, tmp_path):
    """A data config with an image that is missing, one that is damaged, a record without an answer and a long one."""
    shutil.copytree(llava_data / "images", tmp_path / "images")
    (tmp_path / "images" / "3.png").unlink()
    (tmp_path / "images" / "4.png").write_bytes(b"no picture")
    records = json.loads((llava_data / "records.json").read_text())
    records[5]["conversations"] = records[5]["conversations"][:1]
    records[6]["conversations"][1]["value"] = "red " * 60
    (tmp_path / "records.json").write_text(json.dumps(records))
    return dataclasses.replace(stage.data, path=str(tmp_path / "records.json"), image_root=str(tmp_path / "images"),
                               max_targets=48)


def test_every_bad_record_is_named_with_its_reason(tiny_config, spoiled, tmp_path):
    stream = BatchStream(tiny_config, spoiled, 2, 0, "voco")
    stream.close()
    report = check(stream, threads=3)
    assert [(bad["record"], bad["reason"]) for bad in report.bad] == [
        (3, "missing image"), (4, "undecodable image"), (5, "no target")], report.bad
    assert f"{tmp_path}/images/3.png" in report.bad[0]["problem"]
    assert (report.records, report.usable, report.truncated) == (12, 9, 1) and report.dropped_tokens > 0
    assert report.bad_by_reason == {"missing image": 1, "undecodable image": 1, "no target": 1}
    assert json.loads(report.to_json())["bad"] == list(report.bad)
    assert next(csv.DictReader(io.StringIO(report.to_csv()))) == {
        "record": "3", "id": "r3", "reason": "missing image", "problem": report.bad[0]["problem"]}
    assert report.tokens["highest"] == 48 and report.images["lowest"] == 0 and report.images["highest"] == 1
    assert report.rows * report.samples_per_row == pytest.approx(9)
    assert report.rows * report.images_per_row == pytest.approx(8) and 0 < report.fill <= 1
    assert "bad             3 (missing image: 1, undecodable image: 1, no target: 1)" in str(report)
    without_pixels = check(stream, threads=1, decodes=False)
    assert [bad["record"] for bad in without_pixels.bad] == [5] and without_pixels.digest == report.digest
    other = BatchStream(tiny_config, dataclasses.replace(spoiled, template="bare"), 2, 0, "voco")
    other.close()
    assert check(other, 1, limit=1).digest != report.digest and check(other, 1, limit=1).records == 1


def test_words_that_the_tokenizer_does_not_know_are_counted(tiny_config, stage, spoiled, caplog):
    path = Path(spoiled.path)
    records = json.loads(path.read_text())
    records[7]["conversations"][0]["value"] = "<image>\nwhat zebra is the zebra?"
    records[8]["conversations"][1]["value"] = "a red gnu"
    path.write_text(json.dumps(records))
    stream = BatchStream(tiny_config, spoiled, 2, 0, "voco")
    stream.close()
    report = check(stream, threads=1)
    assert report.unknown_words == {"zebra": 2, "gnu": 1}
    assert (report.unknown_records, report.unknown_targets) == (2, 1)
    assert "unknown words   3 in 2 records, 1 of them targets: zebra (2), gnu (1)" in str(report).splitlines()
    with caplog.at_level(logging.WARNING, "vocojax"):
        warn_of_unknown_words(stream)
    (message,) = caplog.messages
    assert message.startswith("the tokenizer does not know some words, which all become <unk>: zebra, gnu (2 of")
    assert " of the 12 records that were looked at have such words, 1 in an answer" in message


def test_known_words_and_byte_fallback_are_no_unknown_words(words, llama_tokenizer):
    assert words.unknown_words("what zebra is red? gnu <unk>") == ["zebra", "gnu"]
    assert words.has_unknown_words and words.unknown_words("what color?") == []
    assert not llama_tokenizer.has_unknown_words and llama_tokenizer.unknown_words("\u56fe zebra \U0001f642") == []


def test_rows_are_filled_as_a_packer_fills_them(tiny_config, stage):
    sizes = [Size(5, 1, 1), Size(9, 0, 2), Size(4, 1, 1), Size(7, 1, 3)]
    shape = dataclasses.replace(BatchStream(tiny_config, stage.data, 1, 0, "voco").shape, length=12, images=1)
    assert list(pack(sizes, shape, window=3)) == [(5, 1, 1), (9, 0, 2), (4, 1, 1), (7, 1, 3)]
    assert list(pack([Size(3, 0, 1)] * 5, shape, window=2)) == [(6, 0, 2), (6, 0, 2), (3, 0, 1)]


@pytest.mark.parametrize("plan", ["single_pass", "two_stage"])
def test_the_page_shows_the_rows_that_training_reads(tiny_config, stage, plan):
    stream = BatchStream(tiny_config, stage.data, 2, 0, "voco", plan=plan)
    batch = next(stream)
    stream.close()
    rows = first_rows(stream, 2)
    for index, items in enumerate(rows):
        for name, array in stream.shape.pack(items).items():
            np.testing.assert_array_equal(array, batch[name][index], err_msg=name)
    text = page(rows, stream.shape, stream.tokenizer)
    items = [item for row in rows for item in row]
    assert text.count('class="unit"') == sum(item.layout.num_units for item in items)
    assert text.count("token target") == sum(item.layout.num_targets for item in items)
    assert text.count('class="mask"') == 2 and text.count(f">image x {tiny_config.unit_tokens}</span>") == sum(
        item.layout.num_units for item in items)
    assert 'token target" style="--role:#3c9d6b">red</span>' in text or "green</span>" in text or "blue</span>" in text


def test_a_point_of_the_mask_has_the_colour_of_its_key():
    row = {"start": np.array([0, 0, 1]), "stop": np.array([1, 3, 3])}
    pixels = np.asarray(mask_picture(row, np.array([Role.VISION, Role.VOCO, Role.TEXT])))
    white, vision, voco, text = [255] * 3, [0x7F, 0xB2, 0xE5], [0xE4, 0x57, 0x2E], [0x3C, 0x9D, 0x6B]
    assert pixels.tolist() == [[vision, white, white], [white, voco, white], [white, voco, text]]


def test_a_thin_line_of_voco_tokens_is_seen_in_the_mask_of_a_long_row():
    """A row of 2,047 tokens: 578 of a unit, whose last one is the VoCo token that all the text after it sees."""
    row = {"start": np.zeros(2047, int), "stop": np.r_[np.full(577, 578), np.full(1470, 2047)]}
    roles = np.r_[Role.BOS, np.full(575, Role.VISION), Role.NEWLINE, Role.VOCO, np.full(1469, Role.TEXT)]
    pixels = np.asarray(mask_picture(row, roles))
    assert pixels.shape == (512, 512, 3)
    assert (pixels[145:, 144] == [0xE4, 0x57, 0x2E]).all()  # 577 // 4
    assert (pixels[200:, :144] == 255).all() and (pixels[400, 145:400] == [0x3C, 0x9D, 0x6B]).all()
