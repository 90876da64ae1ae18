"""Plausible mistakes in Python: each is refused by name, or taken as it was meant."""

import pytest

from vocojax.config import ConfigError
from vocojax.errors import InputError
from vocojax.inference.assistant import Assistant
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
