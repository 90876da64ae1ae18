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
_RELEASED_SYSTEM = VICUNA_SYSTEM.replace("intelligence assistant.", "intelligence assistant of the image.")
_MARKER = re.compile(r"\s*<(?:image|video)>\s*")
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
    """A way to write a conversation as text.

    Attributes:
      name: by which configs select it.
      system: its own system prompt; '' for none.
      stop: ends an answer in addition to the end-of-answer token, when a reply is read; '' for nothing.
      clean: takes the turns without the system turn, and whether the sample has images or videos.
      write: takes the system prompt, the cleaned turns and the end-of-answer token.
    """

    name: str
    system: str
    stop: str
    clean: Callable[[Conversation, bool], Conversation]
    write: Callable[[str, Conversation, str], list[Span]]

    def spans(self, conversation: Conversation, end: str, has_visuals: bool = True) -> list[Span]:
        """Writes a conversation as spans of text, with targets marked.

        Args:
          conversation: its turns; a system turn comes first and replaces the template's own prompt.
          end: the end-of-answer token.
          has_visuals: whether the sample has images or videos.
        """
        system, turns = self.system, conversation
        if conversation and conversation[0].role == "system":
            system, turns = conversation[0].text, conversation[1:]
        return self.write(system, self.clean(turns, has_visuals), end)

    def question(self, conversation: Conversation, has_visuals: bool = True) -> str:
        """Returns the text of a conversation's first question as it is written; '' without one."""
        turns = self.clean(tuple(turn for turn in conversation if turn.role != "system"), has_visuals)
        return next((turn.text for turn in turns if turn.role == "user"), "")


def _dialogue(system: str, turns: Conversation, end: str) -> list[Span]:
    """Vicuna v1: system prompt, then `USER: ... ASSISTANT: ...</s>`; targets are answers with their `</s>`."""
    out = [Span(system)]
    for index, turn in enumerate(turns):
        space = " " if out[-1].text and out[-1].text != end else ""
        if turn.role == "user":
            out.append(Span(f"{space}USER: {turn.text} ASSISTANT:"))
        elif index:
            out += [Span(" " + turn.text, is_target=True), Span(end, is_target=True)]
        else:
            out += [Span(f"{space}ASSISTANT: {turn.text}"), Span(end)]
    return out


def _captions(system: str, turns: Conversation, end: str) -> list[Span]:
    """LLaVA's alignment text: the caption and a newline, without prompt or roles."""
    del system, end
    return [Span(turn.text + "\n", is_target=True) for turn in turns if turn.role == "assistant"]


def _bare(system: str, turns: Conversation, end: str) -> list[Span]:
    """Questions and answers one after the other, without roles."""
    out = [Span(system + " ")] if system else []
    for index, turn in enumerate(turns):
        if turn.role == "user":
            out.append(Span(turn.text))
        elif index:
            out += [Span(" " + turn.text, is_target=True), Span(end, is_target=True)]
        else:
            out += [Span(turn.text), Span(end)]
    return out


def _as_they_are(turns: Conversation, has_visuals: bool) -> Conversation:
    del has_visuals
    return turns


def _without_markers(turns: Conversation, has_visuals: bool) -> Conversation:
    """Markers go, with the white space around them; between two texts a newline is left."""
    del has_visuals
    newline = lambda found: "\n" if found.start() and found.end() < len(found.string) else ""
    cleaned = []
    for turn in turns:
        # Most turns have no marker, and a search for one with white space around it takes longer than this check.
        text = _MARKER.sub(newline, turn.text) if "<image>" in turn.text or "<video>" in turn.text else turn.text
        cleaned.append(Turn(turn.role, text.strip()))
    return tuple(cleaned)


def _as_released(turns: Conversation, has_visuals: bool) -> Conversation:
    """The released code's clean-up (`train_compress.py`): all newlines go, which fuses the words around them.

    It strips only the turn with the marker, and changes nothing in a sample without an image. It drops an assistant's
    turn that opens the conversation.
    """
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if not has_visuals:
        return turns
    cleaned = []
    for turn in turns:
        text = re.sub("<(?:image|video)>", "", turn.text)
        cleaned.append(turn._replace(text=(text if text == turn.text else text.strip()).replace("\n", "")))
    return tuple(cleaned)


TEMPLATES: Mapping[str, Template] = {
    template.name: template
    for template in (
        Template("vicuna_v1", VICUNA_SYSTEM, "", _without_markers, _dialogue),
        Template("released", _RELEASED_SYSTEM, "", _as_released, _dialogue),
        Template("short", "", "", _without_markers, _dialogue),
        Template("bare", "", "", _without_markers, _bare),
        Template("plain", "", "\n", _as_they_are, _captions),
    )
}


def template(name: str) -> Template:
    """Returns the template of that name; an `InputError` lists the names there are."""
    if name not in TEMPLATES:
        raise InputError(f"template must be one of {sorted(TEMPLATES)}, got {name!r}")
    return TEMPLATES[name]
