"""JSON from elsewhere, and lines of JSON for any encoding."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocojax.data.images import ImageError, VideoError
from vocojax.errors import shown
from vocojax.files import json_line, parse_json


@pytest.mark.parametrize("text", ["[" * 200_000, "[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101])
def test_deep_nesting_is_a_value_error(text):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(text)


def test_a_hundred_levels_are_read():
    assert parse_json("[" * 100 + "]" * 100)
    assert parse_json(b'{"a": [1, {"b": "c"}]}') == {"a": [1, {"b": "c"}]}


@given(st.text(st.characters(exclude_categories=())), st.sampled_from(["utf-8", "ascii", "latin-1", None]))
def test_a_line_can_be_written_and_read_in_any_encoding(text, encoding):
    line = json_line({"question": text}, encoding)
    assert "\n" not in line and line.encode(encoding or "utf-8")
    assert json.loads(line) == json.loads(json.dumps({"question": text}))


def test_readable_text_stays_readable():
    assert json_line({"a": "\u00e9"}, "utf-8") == '{"a": "\u00e9"}'
    assert json_line({"a": "\u00e9"}, "ascii") == '{"a": "\\u00e9"}'


def test_a_message_repeats_the_ends_of_a_long_value():
    assert shown("short") == "'short'" and len(shown("long " * 9999)) < 200
    assert re.fullmatch(r"'the start.*\.\.\..*the end'", shown("the start" + "." * 12_000 + "the end"))


def test_messages_about_images_and_videos_shorten_long_names():
    for kind in (ImageError, VideoError):
        message = str(kind("x" * 5000, "can't be read", "unreadable"))
        assert len(message) < 200 and message.endswith(": can't be read")
