"""Clips of easy-VQA's images: their frames, their questions and the answers."""

import re

import pytest

from vocojax.data.sources.easy_vqa import EasyVqaSource
from vocojax.data.sources.easy_vqa_clips import ORDERED, SHARES, EasyVqaClips, Frame, questions_about, words
from vocojax.errors import InputError

pytest.importorskip("easy_vqa")
RED, BLUE = Frame("red", "circle"), Frame("blue", "triangle")


def told(frames, kind):
    return {question.text: question.answer for question in questions_about(frames)[kind]}


def test_questions_about_a_clip_of_three_frames():
    frames = [RED, BLUE, Frame("red", "triangle")]
    assert told(frames, "frame t") == {
        "frame 1 of 3: what color is the shape?": "red",
        "frame 1 of 3: what shape is in the image?": "circle",
        "frame 2 of 3: what color is the shape?": "blue",
        "frame 2 of 3: what shape is in the image?": "triangle",
        "frame 3 of 3: what color is the shape?": "red",
        "frame 3 of 3: what shape is in the image?": "triangle",
    }
    assert told(frames, "first frame") == {
        "first frame of 3: what color is the shape?": "red", "first frame of 3: what shape is in the image?": "circle"}
    assert told(frames, "last frame") == {
        "last frame of 3: what color is the shape?": "red", "last frame of 3: what shape is in the image?": "triangle"}
    assert told(frames, "came first") == {
        "3 frames: what color came first, red or blue?": "red", "3 frames: what color came first, blue or red?": "red"}
    assert told(frames, "change after t") == {
        "frame 1 of 3: does the shape change after it?": "triangle",
        "frame 2 of 3: does the shape change after it?": "no",
    }
    counts = told(frames, "count")
    assert len(counts) == 8
    assert counts["3 frames: how many are red?"] == "2"
    assert counts["3 frames: how many are blue?"] == "1"
    assert counts["3 frames: how many are teal?"] == "0"
    assert told(frames, "change") == {"3 frames: does the shape change?": "yes"}


def test_shapes_that_never_change_are_not_asked_for():
    asked = questions_about([RED, Frame("green", "circle")])
    assert set(asked) == set(SHARES) - {"change after t"}
    assert [question.text for question in asked["first frame"]] == ["first frame of 2: what color is the shape?"]
    assert asked["change"][0].answer == "no"


def test_reversing_a_clip_reverses_what_depends_on_time():
    frames = [RED, BLUE]
    assert told(frames, "came first")["2 frames: what color came first, red or blue?"] == "red"
    assert told(frames[::-1], "came first")["2 frames: what color came first, red or blue?"] == "blue"
    for kind in set(SHARES) - set(ORDERED):
        assert told(frames, kind) == told(frames[::-1], kind)


def test_splits_share_no_image_and_clips_follow_from_their_number():
    images = {}
    for split in ("train", "validation", "test"):
        clips = EasyVqaClips(split, questions=3)
        images[split] = {path for index in range(40) for path in clips.clip(index).images}
        assert images[split] <= set(EasyVqaSource(split).images)
        assert clips.clip(7) == EasyVqaClips(split, questions=3).clip(7) != clips.clip(11)
    assert not images["train"] & images["validation"] and not images["train"] & images["test"]
    assert not images["validation"] & images["test"]


def test_lengths_and_threads():
    clips = EasyVqaClips("validation", questions=5)
    assert [len(clips.clip(index).images) for index in range(17)] == [
        8, 16, 8, 32, 8, 16, 8, 64, 8, 16, 8, 32, 8, 16, 8, 8, 16]
    shorter = EasyVqaClips("validation", 5, frames=16)
    assert [len(shorter.clip(index).images) for index in range(4)] == [8, 16, 8, 8]
    sample = clips[0]
    assert len(sample.threads) == 5 and sample.images == clips.clip(0).images
    assert [turn.role for turn in sample.threads[0]] == ["user", "assistant"]
    with pytest.raises(InputError, match=r"data\.frames must be at least 8"):
        EasyVqaClips("validation", frames=7)
    with pytest.raises(IndexError):
        clips.clip(len(clips))


def test_answers_are_those_of_the_frames_captions():
    source = EasyVqaSource("test")
    captions = {path: source.caption(index) for index, path in enumerate(source.images)}
    clips = EasyVqaClips("test")
    for index in range(8):
        clip = clips.clip(index)
        asked = questions_about([Frame(*captions[path].split()) for path in clip.images])
        for question in clip.questions:
            assert question in asked[question.kind]


def test_all_kinds_are_asked_and_all_words_are_known():
    clips = EasyVqaClips("validation")
    asked = [question for index in range(40) for question in clips.clip(index).questions]
    assert {question.kind for question in asked} == set(SHARES)
    known = set(re.findall(r"\w+", words()))
    assert {word for question in asked for word in re.findall(r"\w+", f"{question.text} {question.answer}")} <= known
