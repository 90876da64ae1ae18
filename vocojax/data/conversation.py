"""Conversations and the templates that turn them into spans of text with targets marked."""

import itertools
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
# LLaVA's names, and those of Hugging Face's chat data.
_ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Turn(NamedTuple):
    """One message.

    In a prompt the last turn is the user's. In training every assistant turn is a target, except one that opens the
    conversation: it answers nothing. A system turn, if any, comes first and replaces the template's system prompt.
    """

    role: Literal["system", "user", "assistant"]
    text: str


Conversation = tuple[Turn, ...]


def conversation_from_llava(record: str, turns: Sequence[Mapping[str, Any]]) -> Conversation:
    """Reads the turns of a record.

    Args:
      record: names the record in errors.
      turns: LLaVA's `[{"from": "human" | "gpt" | "system", "value": text}, ...]`, or those of Hugging Face's chat data,
        `[{"role": "user" | "assistant" | "system", "content": text or parts}, ...]`.

    Raises:
      LayoutError: no turns, an unknown role, a system turn that is not the first, two turns of one role in a row, an
        empty question or answer.
    """
    if not isinstance(turns, list | tuple) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise LayoutError(record, "has no conversation", "no conversation")
    conversation: list[Turn] = []
    for index, turn in enumerate(turns):
        name = turn.get("from", turn.get("role"))
        if not isinstance(name, str) or name not in _ROLES:
            raise LayoutError(record, f"turn {index} has the unknown role {name!r}; known: {', '.join(_ROLES)}",
                              "unknown role")
        role, text = _ROLES[name], _text_of(turn.get("value", turn.get("content")))
        if text is None:
            raise LayoutError(record, f"turn {index} has no text", "no text")
        if not is_unicode(text):
            raise LayoutError(record, f"turn {index} is not UTF-8", "not UTF-8")
        if role != "system" and not text.strip():
            kind = "answer" if role == "assistant" else "question"
            raise LayoutError(record, f"turn {index} is an empty {kind}", f"empty {kind}")
        conversation.append(Turn(role, text))
    require_turns(record, conversation)
    return tuple(conversation)


def require_turns(record: str, conversation: Sequence[Turn]) -> None:
    """Checks the order of a conversation's roles, in training and in prompts.

    Raises:
      LayoutError: a system turn is not the first, or two turns of one role follow each other.
    """
    if any(turn.role == "system" for turn in conversation[1:]):
        raise LayoutError(record, "has a system turn that is not the first turn: move it there", "roles out of turn")
    for index, (before, turn) in enumerate(itertools.pairwise(conversation), 1):
        if turn.role == before.role:
            raise LayoutError(record, f"turn {index} is the {turn.role}'s, as the one before: join them into one",
                              "roles out of turn")


def _text_of(content: Any) -> str | None:
    """Returns a turn's text, with `<image>` and `<video>` in place of such parts; None for anything else."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part["text"] if kind == "text" and "text" in part else f"<{kind}>"
        if kind not in ("text", "image", "video") or not isinstance(text, str):
            return None
        texts.append(text)
    return "\n".join(texts)


def is_unicode(text: str) -> bool:
    """Returns whether a text can be written as UTF-8: one with lone surrogates, from JSON's escapes, can't."""
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
        for index, turn in enumerate(turns):
            text, space = clean(turn.text), " " if out[-1].text and out[-1].text != end else ""
            if turn.role == "user":
                out.append(Span(f"{space}USER: {text} ASSISTANT:"))
            elif index:
                out += [Span(" " + text, is_target=True), Span(end, is_target=True)]
            else:
                out += [Span(f"{space}ASSISTANT: {text}"), Span(end)]
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
    for index, turn in enumerate(turns):
        text = _without_markers(turn.text)
        if turn.role == "user":
            out.append(Span(text))
        elif index:
            out += [Span(" " + text, is_target=True), Span(end, is_target=True)]
        else:
            out += [Span(text), Span(end)]
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
