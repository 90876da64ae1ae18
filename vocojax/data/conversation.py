"""Conversations and the templates that turn them into spans of text with targets marked."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vocojax.errors import InputError
from vocojax.layout import LayoutError, Span

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names


class Turn(NamedTuple):
    """One message.

    In a prompt the last turn is the user's; in training every assistant turn is a target. A system turn, if any, comes
    first and replaces the template's system prompt.
    """

    role: Literal["system", "user", "assistant"]
    text: str


Conversation = tuple[Turn, ...]


def conversation_from_llava(record: str, turns: Sequence[Mapping[str, Any]]) -> Conversation:
    """Reads LLaVA's `[{"from": "human" | "gpt", "value": text}, ...]`.

    Raises:
      LayoutError: no turns, an unknown role, roles that don't alternate from the user on, an empty answer.
    """
    if not isinstance(turns, list | tuple) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise LayoutError(record, "has no conversation", "no conversation")
    conversation = []
    for index, turn in enumerate(turns):
        role, text = turn.get("from"), turn.get("value")
        if not isinstance(role, str) or role not in _ROLES:
            raise LayoutError(record, f"turn {index} has the unknown role {role!r}; known: human, gpt", "unknown role")
        if not isinstance(text, str):
            raise LayoutError(record, f"turn {index} has no text", "no text")
        if not is_unicode(text):
            raise LayoutError(record, f"turn {index} is not UTF-8", "not UTF-8")
        if _ROLES[role] != ("user", "assistant")[index % 2]:
            raise LayoutError(record, f"turn {index} is {role}'s, out of turn", "roles out of turn")
        if role == "gpt" and not text.strip():
            raise LayoutError(record, f"turn {index} is an empty answer", "empty answer")
        conversation.append(Turn(_ROLES[role], text))  # type: ignore[arg-type]
    return tuple(conversation)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: one with lone surrogates, from JSON's escapes, can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Template:
    """How a conversation is written out. `spans` takes the turns and the end-of-answer token."""

    name: str
    stop: str  # what ends an answer besides the end-of-answer token, for reading a reply; '' for nothing
    spans: Callable[[Conversation, str], list[Span]]


def _dialogue(system: str, clean: Callable[[str], str]) -> Callable[[Conversation, str], list[Span]]:
    """Vicuna v1: system prompt, then `USER: ... ASSISTANT: ...</s>`; targets are answers with their `</s>`."""

    def spans(conversation: Conversation, end: str) -> list[Span]:
        own_system, turns = _split_system(conversation)
        out = [Span(system if own_system is None else own_system)]
        for turn in turns:
            text = clean(turn.text)
            if turn.role == "user":
                opening = " " if out[-1].text and out[-1].text != end else ""
                out.append(Span(f"{opening}USER: {text} ASSISTANT:"))
            else:
                out += [Span(" " + text, is_target=True), Span(end, is_target=True)]
        return out

    return spans


def _split_system(conversation: Conversation) -> tuple[str | None, Conversation]:
    """Returns the text of the system turn, or None without one, and the other turns."""
    if conversation and conversation[0].role == "system":
        return conversation[0].text, conversation[1:]
    return None, conversation


def _plain(conversation: Conversation, end: str) -> list[Span]:
    """LLaVA's alignment text: the caption and a newline, without prompt or roles."""
    del end
    captions = [turn.text for turn in conversation if turn.role == "assistant"]
    return [Span(caption + "\n", is_target=True) for caption in captions]


def _bare(conversation: Conversation, end: str) -> list[Span]:
    """Questions and answers one after the other, without roles."""
    system, turns = _split_system(conversation)
    out = [] if system is None else [Span(system + " ")]
    for turn in turns:
        text = _without_markers(turn.text)
        out += [Span(text)] if turn.role == "user" else [Span(" " + text, is_target=True), Span(end, is_target=True)]
    return out


def _without_markers(text: str) -> str:
    return re.sub(r"\s*<(?:image|video)>\s*", lambda m: "\n" if m.start() and m.end() < len(text) else "", text).strip()


def _released(text: str) -> str:
    """The released code's clean-up: markers go, and so does every newline, which fuses the words around it."""
    return text.replace("<image>", "").replace("\n", "").strip()


TEMPLATES: Mapping[str, Template] = {
    template.name: template
    for template in (
        Template("vicuna_v1", "", _dialogue(VICUNA_SYSTEM, _without_markers)),
        Template("released", "", _dialogue(VICUNA_SYSTEM, _released)),
        Template("short", "", _dialogue("", _without_markers)),
        Template("bare", "", _bare),
        Template("plain", "\n", _plain),
    )
}


def template(name: str) -> Template:
    """The template of that name; `InputError` lists the names there are."""
    if name not in TEMPLATES:
        raise InputError(f"template must be one of {sorted(TEMPLATES)}, got {name!r}")
    return TEMPLATES[name]
