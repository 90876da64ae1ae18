import pytest

from vocojax.data.conversation import Turn, conversation_from_llava, template
from vocojax.layout import LayoutError


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_llava_records_become_turns():
    conversation = conversation_from_llava("r", turns("<image>\nq", "a"))
    assert conversation == (Turn("user", "<image>\nq"), Turn("assistant", "a"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "no conversation"),
        ([{"from": "tool", "value": "x"}], "unknown role"),
        (turns("q", "a", "q")[::2], "roles out of turn"),
        ([*turns("q", "a"), {"from": "system", "value": "x"}], "roles out of turn"),
        ([{"from": "system", "value": "x"}] * 2, "roles out of turn"),
        (turns(" \n", "a"), "empty question"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "no text"),
        (turns("q", "  "), "empty answer"),
        ([{"from": "human"}], "no text"),
    ],
)
def test_bad_conversations_name_record_and_reason(record, reason):
    with pytest.raises(LayoutError, match="record 'r1'") as error:
        conversation_from_llava("r1", record)
    assert error.value.reason == reason


def test_a_record_s_system_turn_replaces_the_template_s_prompt():
    record = [{"from": "system", "value": "Answer in one word."}, *turns("what?", "a bus")]
    said = {name: "".join(span.text for span in template(name).spans(conversation_from_llava("r", record), "</s>"))
            for name in ("vicuna_v1", "short", "bare", "plain")}
    assert said == {"vicuna_v1": "Answer in one word. USER: what? ASSISTANT: a bus</s>",
                    "short": "Answer in one word. USER: what? ASSISTANT: a bus</s>",
                    "bare": "Answer in one word. what? a bus</s>", "plain": "a bus\n"}


@pytest.mark.parametrize(("name", "opening"), [("short", "ASSISTANT: Hello</s>"), ("bare", "Hello</s>")])
def test_an_assistant_who_speaks_first_is_no_target(name, opening):
    conversation = conversation_from_llava("r", [{"from": "gpt", "value": "Hello"}, *turns("what?", "a bus")])
    spans = template(name).spans(conversation, "</s>")
    assert "".join(span.text for span in spans).startswith(opening)
    assert [span.text for span in spans if span.is_target] == [" a bus", "</s>"]


def test_the_chat_form_of_hugging_face_is_read():
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": parts},
                {"role": "assistant", "content": "a bus"}]
    assert conversation_from_llava("r", messages) == (
        Turn("system", "S"), Turn("user", "<image>\nwhat?"), Turn("assistant", "a bus"))


def test_targets_are_answers_with_their_end():
    conversation = (Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "q2"), Turn("assistant", "a2"))
    spans = template("short").spans(conversation, "</s>")
    assert "".join(s.text for s in spans) == "USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>"
    assert [s.text for s in spans if s.is_target] == [" a1", "</s>", " a2", "</s>"]


def test_plain_is_the_caption_alone():
    spans = template("plain").spans((Turn("user", "<image>\nDescribe."), Turn("assistant", "a red bus")), "</s>")
    assert [(s.text, s.is_target) for s in spans] == [("a red bus\n", True)]


@pytest.mark.parametrize(
    ("text", "clean"), [("<image>\nq", "q"), ("q\n<image>", "q"), ("a\n<image>\nb", "a\nb"), ("q", "q")]
)
def test_image_markers_leave_no_trace(text, clean):
    spans = template("short").spans((Turn("user", text),), "</s>")
    assert "".join(s.text for s in spans) == f"USER: {clean} ASSISTANT:"


def test_unknown_template_lists_the_known():
    with pytest.raises(ValueError, match="released"):
        template("v1")


RELEASED = ("A chat between a curious user and an artificial intelligence assistant of the image. The assistant gives "
            "helpful, detailed, and polite answers to the user's questions.")


def test_released_with_an_image_is_the_released_code_s_text():
    """All newlines go, in every turn; only the turn that holds `<image>` is stripped."""
    record = turns(" <image>\nWhat is\nit? ", "a bus \n", " why?\n", "it is\nred")
    spans = template("released").spans(conversation_from_llava("r", record), "</s>", has_visuals=True)
    assert "".join(span.text for span in spans) == (
        f"{RELEASED} USER: What isit? ASSISTANT: a bus </s>USER:  why? ASSISTANT: it isred</s>")


def test_released_without_an_image_keeps_newlines():
    record = turns("Is 11 a prime number\nbelow ten? ", "No.\n\n")
    spans = template("released").spans(conversation_from_llava("r", record), "</s>", has_visuals=False)
    assert "".join(span.text for span in spans) == (
        f"{RELEASED} USER: Is 11 a prime number\nbelow ten?  ASSISTANT: No.\n\n</s>")


def test_released_drops_an_assistant_who_speaks_first():
    record = [{"from": "gpt", "value": "Hello"}, *turns("<image>\nq", "a")]
    spans = template("released").spans(conversation_from_llava("r", record), "</s>")
    assert "".join(span.text for span in spans) == f"{RELEASED} USER: q ASSISTANT: a</s>"
