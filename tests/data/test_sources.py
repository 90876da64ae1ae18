"""Sources other than LLaVA's JSON and easy-VQA: what their records become, and which are refused."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests.data.test_videos import write_video
from vocojax.config import ConfigError
from vocojax.data.config import DataConfig, PartConfig
from vocojax.data.conversation import Turn
from vocojax.data.loader import BatchStream
from vocojax.data.packing import row_shape
from vocojax.data.prepared import PreparedSource
from vocojax.data.sources import open_source
from vocojax.data.sources.llava import LlavaSource
from vocojax.data.sources.mixture import MixtureSource
from vocojax.data.sources.shikra import ShikraSource, write_place
from vocojax.data.sources.video_chatgpt import VideoChatGptSource
from vocojax.data.sources.webvid import WebVidSource
from vocojax.layout import LayoutError


def test_webvid_rows_are_captioned_videos(tmp_path):
    (tmp_path / "x.csv").write_bytes(
        b'videoid,contentUrl,duration,page_dir,name\n1,u,PT1S,000_050,"A dog, running"\n2,u,PT1S,a, \n'
        b"3,u,PT1S,../..,x\n4,u,PT1S,a,\xff\n5\n")
    source = WebVidSource(tmp_path / "x.csv", tmp_path)
    assert source[0].videos == (tmp_path.resolve() / "000_050" / "1.mp4",) and source[0].id == "1"
    assert source[0].threads == ((Turn("user", "<video>"), Turn("assistant", "A dog, running")),)
    reasons = ["empty answer", "video outside root", "not UTF-8", "malformed record"]
    for index, reason in enumerate(reasons, 1):
        with pytest.raises(LayoutError) as error:
            source[index]
        assert error.value.reason == reason
    (tmp_path / "z.csv").write_text("videoid,page_dir,name\n1,a," + "x" * 200_000)
    with pytest.raises(ConfigError, match=r"data\.path must be readable as 'webvid': .*z\.csv: not a WebVid CSV"):
        open_source(DataConfig(source="webvid", path=str(tmp_path / "z.csv")))
    (tmp_path / "y.csv").write_text("videoid,name\n")
    with pytest.raises(ValueError, match="lacks the columns page_dir"):
        WebVidSource(tmp_path / "y.csv", tmp_path)


def test_a_byte_order_mark_is_not_part_of_a_column(tmp_path):
    (tmp_path / "x.csv").write_text("videoid,page_dir,name\n1,a,A dog\n", encoding="utf-8-sig")
    assert WebVidSource(tmp_path / "x.csv", tmp_path)[0].id == "1"


def llava_record(path, asked, **files):
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "a bus"}]
    path.write_text(json.dumps([{"id": "r", **files, "conversations": turns}]))
    return LlavaSource(path, path.parent)[0]


@pytest.mark.parametrize(
    ("asked", "files", "reason"),
    [
        ("<image>\nwhat?", {"video": "v.mp4"}, ""),
        ("<video>\nwhat?", {"video": "v.mp4"}, ""),
        ("<image>\n<image>\nwhat?", {"video": ["v.mp4", "w.mp4"]}, ""),
        ("<image>\n<video>\nwhat?", {"video": "v.mp4", "image": "i.png"}, ""),
        ("<image>\n<image>\nwhat?", {"video": "v.mp4", "image": "i.png"}, ""),
        ("<image>\n<video>\nwhat?", {"video": "v.mp4"}, "more <image> than images"),
        ("<video>\n<video>\nwhat?", {"video": "v.mp4", "image": "i.png"}, "more <video> than videos"),
        ("<image>\nwhat?", {}, "more <image> than images"),
    ],
)
def test_a_video_may_be_marked_as_an_image(tmp_path, asked, files, reason):
    """As in LLaMA-VID's and LLaVA-NeXT's data."""
    try:
        sample = llava_record(tmp_path / "x.json", asked, **files)
    except LayoutError as error:
        assert error.reason == reason
    else:
        assert not reason
        assert [file.name for file in sample.videos] == [name for name in ("v.mp4", "w.mp4") if name in str(files)]


def test_lists_and_directories_of_frames_are_videos(tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8), (number,) * 3).save(tmp_path / f"{number}.png")
    frames = tuple(tmp_path.resolve() / f"{number}.png" for number in range(3))
    names = ["0.png", "1.png", "2.png"]
    assert llava_record(tmp_path / "x.json", "<video>what?", frames=names).videos == (frames,)
    assert llava_record(tmp_path / "x.json", "<image>what?", frames=names).videos == (frames,)
    assert llava_record(tmp_path / "x.json", "<image>" * 3, frames=names).videos == (frames,)
    assert llava_record(tmp_path / "x.json", "<video>what?", video=".").videos == (tmp_path.resolve(),)
    assert llava_record(tmp_path / "x.json", "<image>", image="i.png", frames=7).videos == ()  # a count, in some data
    with pytest.raises(LayoutError, match="leaves the frame root") as error:
        llava_record(tmp_path / "x.json", "<video>", frames=["../0.png"])
    assert error.value.reason == "frame outside root"


@pytest.mark.parametrize("fit", ["pad", "anyres"])
def test_images_and_videos_of_a_record_are_units_in_order(tmp_path, tiny_config, words, fit):
    """The image first (with anyres in tiles), then one unit for each frame."""
    Image.new("RGB", (64, 64), (200,) * 3).save(tmp_path / "i.png")
    for number in range(5):
        Image.new("RGB", (64, 64), (10 * number,) * 3).save(tmp_path / f"{number}.png")
    write_video(tmp_path / "v.mp4", frames=3)
    llava_record(tmp_path / "x.json", "<image><video><video>what?", image="i.png", video="v.mp4",
                 frames=[f"{number}.png" for number in range(5)])
    data = DataConfig(path=str(tmp_path / "x.json"), image_root=str(tmp_path), template="short", row_length=512,
                      images_per_row=16, frames=4, fit=fit)
    source = PreparedSource(open_source(data), tiny_config, data, words, row_shape(data, 32, 4, "voco"))
    greys = [int(unit[16, 16, 0]) for unit in source.load(source.lay_out(0)).images]
    tiles = 1 if fit == "pad" else 5
    assert greys[:tiles] == [200] * tiles
    assert np.abs(np.array(greys[tiles:]) - [0, 1, 2, 0, 10, 30, 40]).max() <= 1


def test_jitter_draws_other_frames_in_every_epoch(tmp_path, tiny_config, words):
    for number in range(200):
        Image.new("RGB", (8, 8), (number,) * 3).save(tmp_path / f"{number}.png")
    turns = [{"from": "human", "value": "<video>what?"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "x.json").write_text(json.dumps([{"video": ".", "conversations": turns}]))
    data = DataConfig(path=str(tmp_path / "x.json"), image_root=str(tmp_path), template="short", row_length=512,
                      frames=3, frame_jitter=True)

    def drawn(seed, position):
        source = PreparedSource(open_source(data), tiny_config, data, words, row_shape(data, 32, 4, "voco"), seed)
        return [int(path.stem) for path in source.lay_out(0, position).videos[0].video]

    assert drawn(0, 0) == drawn(0, 0)
    assert len({tuple(drawn(seed, position)) for seed in (0, 1) for position in (0, 1)}) == 4
    with pytest.raises(ConfigError, match="frame_jitter must be off with keep_in_memory"):
        dataclasses.replace(data, keep_in_memory=True)


def test_the_chat_form_of_hugging_face(tmp_path):
    messages = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a bus"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages, "images": ["i.png"]}))
    sample = LlavaSource(tmp_path / "x.jsonl", tmp_path)[0]
    assert sample.images == (tmp_path.resolve() / "i.png",)
    assert sample.threads == ((Turn("user", "<image>what?"), Turn("assistant", "a bus")),)


def test_video_chatgpt_raw_and_converted(tmp_path):
    (tmp_path / "b.mkv").write_bytes(b"")
    turns = [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "x"}]
    records = [{"video_id": "a", "q": "what?", "a": "yes"}, {"video_id": "b", "q": "why?", "a": "so"},
               {"id": 1, "video": "c.mp4", "conversations": turns}, {"video_id": "a", "q": "what?", "a": ""},
               {"video_id": 5}, {"id": 1, "conversations": turns}, {"video_id": "v" * 300, "q": "what?", "a": "yes"}]
    (tmp_path / "x.json").write_text(json.dumps(records))
    source = VideoChatGptSource(tmp_path / "x.json", tmp_path)
    assert [source[i].threads[0][0].text for i in range(3)] == ["what?\n<video>", "<video>\nwhy?", "<video>\nwhat?"]
    assert [source[i].videos[0].name for i in range(3)] == ["a.mp4", "b.mkv", "c.mp4"]
    assert len(source[6].videos[0].name) == 304  # no system call takes it: counted when it is read
    for index, reason in ((3, "empty answer"), (4, "malformed record"), (5, "more <video> than videos")):
        with pytest.raises(LayoutError) as error:
            source[index]
        assert error.value.reason == reason


@pytest.mark.parametrize(
    ("numbers", "padded", "text"),
    [
        ([0, 0, 100, 50], False, "[0.000,0.000,1.000,1.000]"),
        ([0, 0, 100, 50], True, "[0.000,0.250,1.000,0.750]"),
        ([12.34, 25, 200, -3], False, "[0.123,0.500,1.000,0.000]"),
        ([50, 25], True, "[0.500,0.500]"),
    ],
)
def test_boxes_and_points_literally(numbers, padded, text):
    assert write_place(numbers, 100, 50, padded) == text


def test_shikra_s_three_tasks(tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "i.png")
    lines = [{"img_path": "i.png", "expression": "the dog", "bbox": [10, 20, 30, 40]},
             {"file_path": "i.png", "question": "what is", "answer": "dog", "bbox": None, "point": [50, 25]},
             {"img_path": "i.png", "expression": "", "bbox": [1, 2, 3, 4]}, {"img_path": "i.png", "expression": "x"},
             {"img_path": "none.png", "expression": "x", "bbox": [1, 2, 3, 4]},
             {"file_path": "i.png", "general_question": "how many", "answer": "3", "bbox": None, "point": [50, 25]},
             *[{"file_path": "i.png", "obj_question": "a", "super_question": "b", "general_question": "c",
                "answer": "3", "bbox": [0, 0, 100, 50], "point": [50, 25], "number": number} for number in range(6)]]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    make = lambda task: ShikraSource(tmp_path / "x.jsonl", tmp_path, task, "square")
    said = lambda task, index: [turn.text for turn in make(task)[index].threads[0]]
    assert said("rec", 0) == ["<image>\nWhere is the dog?",
                              "Answer: [0.100,0.400,0.300,0.800] ."]
    assert said("reg", 0) == ["<image>\nPlease generate a distinguishing description for the region "
                              "[0.100,0.400,0.300,0.800] in the image.", "the dog"]
    asked = "<image>\nPlease quickly answer this question: {}[0.500,0.500] in a simple manner."
    assert said("pointqa", 1) == [asked.format("what is"), "The answer is dog ."]
    assert said("pointqa", 5) == [asked.format("how many"), "The answer is 3 ."]
    turns = {said("pointqa", index)[0].split(": ")[1] for index in range(6, 12)}
    assert turns == {f"{word}{place} in a simple manner." for word in "abc"
                     for place in ("[0.500,0.500]", "[0.000,0.000,1.000,1.000]")}
    for index, reason in ((2, "empty answer"), (3, "malformed record"), (4, "missing image")):
        with pytest.raises(LayoutError) as error:
            make("rec")[index]
        assert error.value.reason == reason
    with pytest.raises(ValueError, match=r"data\.fit must be"):
        ShikraSource(tmp_path / "x.jsonl", tmp_path, "rec", "crop")


def test_mixtures_hold_each_record_weight_times():
    class Numbers(list):
        pass

    mixture = MixtureSource([(Numbers("abcd"), 2.0), (Numbers(), 1.0), (Numbers("xyzw"), 0.5)])
    drawn = sorted(mixture[i] for i in range(len(mixture)))
    assert drawn[:8] == list("aabbccdd") and len(drawn) == 10
    assert len(set(drawn[8:])) == 2 and set(drawn[8:]) <= set("wxyz")
    with pytest.raises(ValueError, match="must be > 0"):
        MixtureSource([(Numbers("a"), 0.0)])


def test_videos_and_images_are_mixed_in_one_stream(tmp_path, tiny_config, llava_data):
    write_video(tmp_path / "a.mp4", frames=20)
    (tmp_path / "short.mp4").write_bytes(write_video(tmp_path / "b.mp4", frames=2).read_bytes())
    records = [{"video_id": name, "q": "what color?", "a": "red"} for name in ("a", "short")]
    (tmp_path / "v.json").write_text(json.dumps(records))
    data = DataConfig(
        mixture=(PartConfig("llava", path=str(llava_data / "records.json"), image_root=str(llava_data / "images")),
                 PartConfig("video_chatgpt", path=str(tmp_path / "v.json"), image_root=str(tmp_path), weight=3.0)),
        tokenizer=str(llava_data / "tokenizer"), template="short", row_length=64, images_per_row=4, frames=3,
        num_threads=2, pack_window=4, max_skipped_share=1.0)
    assert len(open_source(data)) == 12 + 6
    stream = BatchStream(tiny_config, data, 2, 0, "voco")
    units = []
    while stream.tally.records < 60:
        units.append(next(stream)["images"].reshape(8, 32, 96)[:, 16].astype(int))  # the middle row
    lowest, highest = np.concatenate(units).min(1), np.concatenate(units).max(1)
    grey = lowest[(highest - lowest <= 1) & (highest > 0)]
    assert {1, 10, 19} <= set(grey) | set(grey + 1) and (highest - lowest > 100).any()  # frames of both, and images
    assert not stream.tally.skipped()  # a video of two frames has two units
    broken = dataclasses.replace(data.mixture[0], path="none.json")
    with pytest.raises(ConfigError, match=r"data\.mixture\[0\]\.path must be readable as 'llava'.*none\.json"):
        open_source(dataclasses.replace(data, mixture=(broken,)))


def test_anyres_tiles_are_units_of_a_row(tiny_config, llava_data):
    data = DataConfig(path=str(llava_data / "records.json"), image_root=str(llava_data / "images"),
                      tokenizer=str(llava_data / "tokenizer"), template="short", row_length=80, images_per_row=5,
                      num_threads=2, fit="anyres", pack_window=4)
    batch = next(BatchStream(tiny_config, data, 4, 0, "voco"))
    units = (batch["images"].reshape(4, 5, -1) != 0).any(-1).sum(1)
    assert set(units) <= {0, 3, 4, 5} and units.max() >= 3
    assert ((batch["vision"] >= 0).sum(1) == units * 4).all()
