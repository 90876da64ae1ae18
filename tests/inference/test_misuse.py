"""Plausible mistakes in Python: each is refused by name, or taken as it was meant."""

import pytest
from PIL import Image

from vocojax.config import ConfigError
from vocojax.data.conversation import Turn
from vocojax.errors import InputError
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.store import Store
from vocojax.inference.collection import find_files
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.many import answer_many
from vocojax.inference.requests import Request
from vocojax.inference.visuals import Video

FEW = SamplingConfig(max_new_tokens=2)


@pytest.mark.parametrize("visibility", ["casual", "VoCo", ""])
def test_an_unknown_visibility_is_refused(assistant, visibility):
    """It would be a mask that is neither `voco` nor `causal`."""
    with pytest.raises(ConfigError, match=rf"^visibility must be one of \['voco', 'causal'\], got '{visibility}'"):
        Assistant(assistant.model, assistant.tokenizer, assistant.template, visibility)


@pytest.mark.parametrize(("settings", "message"), [
    ({"stop": "re"}, r"stop must be a tuple of strings, .*, got 're'"),
    ({"stop": ("a", 3)}, r"stop must be a tuple of strings"),
    ({"seed": 1.5}, r"seed must be a whole number, got 1\.5"),
    ({"seed": "x"}, r"seed must be a whole number"),
    ({"temperature": "hot"}, r"temperature must be a number, got 'hot'"),
])
def test_settings_of_another_type_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**settings)


@pytest.mark.parametrize(("settings", "message"), [
    ({"sampling": "unifrm"}, "sampling must be one of"), ({"frames": 0}, "frames must be >= 1"),
    ({"seconds": 0}, "seconds must be > 0"),
])
def test_a_video_that_cannot_be_read_so_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Video("clip.mp4", **settings)


@pytest.mark.parametrize(("fields", "message"), [
    ({"conversation": 3}, "conversation must be a question or a tuple of Turns, got int"),
    ({"conversation": ["a"]}, "conversation must be a question or a tuple of Turns, got list"),
    ({"system": 3}, "system must be a text or None, got int"),
    ({"sampling": {"seed": 1}}, "sampling must be a SamplingConfig, got dict"),
    ({"visuals": "a.png"}, "visuals must be a tuple, got str"),
])
def test_a_request_of_another_type_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Request(**{"conversation": "what color is the shape?", **fields})


def test_visuals_may_be_a_list():
    assert Request("what?", ["a.png"]).visuals == ("a.png",)


def test_an_image_of_another_type_spoils_no_other_request(assistant, images):
    requests = [Request("what color is the shape?", (image,), FEW) for image in (None, images[0], 3)]
    first, good, last = answer_many(assistant, requests, progress=None)
    assert "must be a path, a PIL image, an array, a Video, Frames or a Visual, got NoneType" in first.error
    assert "got int" in last.error and not good.error


def test_what_is_no_list_no_store_and_no_batch_is_refused(assistant, images):
    request = Request("what color is the shape?", (images[0],), FEW)
    for arguments, message in (
        ((request,), "requests must be a list of Requests, got Request"),
        (([request], "caches"), r"store must be a Store, got str: Store\('caches'\) is one"),
    ):
        with pytest.raises(InputError, match=message):
            list(answer_many(assistant, *arguments, progress=None))
    with pytest.raises(ConfigError, match="batch_size must be >= 1, got 0"):
        list(answer_many(assistant, [request], batch_size=0))
    with pytest.raises(InputError, match="store must be a Store, got str"):
        assistant.recall("caches", images[0])


def test_a_cache_is_shown_in_a_line(cache):
    assert repr(cache).startswith("VocoCache(5 units of 2 tokens, float32, model ") and len(repr(cache)) < 80


def test_a_file_whose_name_looks_like_a_pattern_is_found(tmp_path):
    (tmp_path / "photo [1].png").touch()
    assert find_files([str(tmp_path / "photo [1].png")]) == [str(tmp_path / "photo [1].png")]


def test_an_image_is_answered_about_the_way_the_model_was_trained(assistant, images, cache):
    """A VoCo model answers from caches, a causal one from whole images; both answer without an image."""
    question = "what color is the shape?"
    assert assistant.answer(images, question, FEW) == assistant.read(cache, question, sampling=FEW)
    causal = Assistant(assistant.model, assistant.tokenizer, assistant.template, "causal")
    (whole,) = answer_many(causal, [Request(question, (images[0],), FEW)], progress=None)
    assert causal.answer(images[0], question, FEW) == [whole.text]
    (text_only,) = answer_many(assistant, [Request(question, (), FEW)], progress=None)
    assert assistant.answer((), [question, question], FEW) == [text_only.text] * 2
    for compresses in (causal.compress, lambda image: causal.recall(Store("none"), image)):
        with pytest.raises(InputError, match="was trained without the VoCo mask, so it reads whole images"):
            compresses(images[0])


def test_a_conversation_has_a_history(assistant, cache):
    turns = (Turn("user", "what color is the shape?"), Turn("assistant", "red"), Turn("user", "what color is red?"))
    wanted = assistant.texts(assistant.generate_behind(cache, [turns], [range(5)], FEW), FEW)
    assert assistant.read(cache, turns, sampling=FEW) == wanted
    assert assistant.read(cache, [turns, "what color is red?"], sampling=FEW, seeds=[0, 0])[0] == wanted[0]


def test_one_where_a_list_is_meant_is_taken_as_one(assistant, images, cache, tmp_path):
    question = "what color is the shape?"
    assert assistant.read(cache, question, [2, 0], FEW) == assistant.read(cache, [question], [[2, 0]], FEW)
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    (alone,), (listed,) = (assistant.load_images(what) for what in (str(tmp_path / "a.png"), [tmp_path / "a.png"]))
    assert (alone == listed).all() and alone.shape == (32, 32, 3)
    for questions, units, message in (
        (3, None, "questions must be a text, a conversation or a list of them, got int"),
        ([question, 3], None, "a question must be a text or a conversation .*, got 3"),
        ([question, question], [0, 1], r"units must be one list per question, got \[0, 1\] for 2 questions"),
    ):
        with pytest.raises(InputError, match=message):
            assistant.read(cache, questions, units, FEW)
    with pytest.raises(InputError, match="cache must be a VocoCache, got str: "):
        assistant.read("a.png", question)
    with pytest.raises(ConfigError, match=r"storage must be one of \['exact', 'int8'\], got 'int4'"):
        Store("none", storage="int4")


def test_the_exact_prompt_is_shown(assistant):
    assert assistant.prompt("what color is the shape?") == (
        "<s><image x 4>\n <voco> <voco> \n USER : what color is the shape ? ASSISTANT :")
    assert assistant.prompt("what is red?", 0).endswith("what is red ? ASSISTANT :")


def test_a_visual_is_shown_in_a_line(assistant, images):
    assert repr(assistant.visual(images[0])) == "Visual(1 units of (32, 32, 3))"
