"""Requests and answers: the types that evaluation, serving and scripts share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vocojax.data.conversation import Conversation, Turn
from vocojax.errors import InputError, shown
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.decoding.sampling import GREEDY, SamplingConfig
from vocojax.inference.decoding.text import FinishReason
from vocojax.inference.runner import not_about
from vocojax.inference.visuals import VisualSource

Questions = str | Conversation | Sequence[str | Conversation]


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt to be answered.

    Attributes:
      conversation: a question, or turns of which the last one is the user's.
      visuals: before the text, in their order: files, images, videos, prepared units, or caches of visuals that are
        compressed already (which can't be read in a single pass).
      sampling: how the answer's tokens are chosen and what ends it.
      system: replaces the template's system prompt; None keeps it.
    """

    conversation: str | Conversation
    visuals: tuple[VisualSource | VocoCache, ...] = ()
    sampling: SamplingConfig = GREEDY
    system: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.visuals, tuple | list):
            raise InputError(f"visuals must be a tuple, got {type(self.visuals).__name__}: write (visual,) for one")
        object.__setattr__(self, "visuals", tuple(self.visuals))
        if not isinstance(self.sampling, SamplingConfig):
            raise InputError(f"sampling must be a SamplingConfig, got {type(self.sampling).__name__}")
        if not isinstance(self.system, str | None):
            raise InputError(f"system must be a text or None, got {type(self.system).__name__}")
        turns = () if isinstance(self.conversation, str) else self.conversation
        if not isinstance(turns, tuple | list) or not all(isinstance(turn, Turn) for turn in turns):
            raise InputError("conversation must be a question or a tuple of Turns, got "
                             f"{type(self.conversation).__name__}")

    @property
    def turns(self) -> Conversation:
        """The whole conversation, with a system turn if there is a system text."""
        said = (Turn("user", self.conversation),) if isinstance(self.conversation, str) else self.conversation
        return said if self.system is None else (Turn("system", self.system), *said)


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer to a request.

    Attributes:
      text: the answer; '' after an error.
      finish_reason: `stop` for the end token (or the template's own end), `length` for the length limit, `stop_string`
        for one of the request's stop strings, `error` if the request could not be answered.
      prompt_tokens: tokens of the prompt that were read: its text and, of each unit, the cached tokens, or all of them
        in a single pass.
      token_ids: tokens of the answer without the end token; with a stop string, up to the token that completed it.
      error: what is wrong with the request, or ''.
      first_logits_V: fp32 logits of the first token, where they were asked for.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    error: str = ""
    first_logits_V: np.ndarray | None = None

    @property
    def answer_tokens(self) -> int:
        """How many tokens the answer has."""
        return len(self.token_ids)


def conversations_of(questions: Questions) -> list[Conversation]:
    """Returns questions as conversations.

    Args:
      questions: one question, one conversation (turns, of which the last is the user's), or several of them.

    Raises:
      InputError: something else is among them.
    """
    is_one = isinstance(questions, str) or (
        isinstance(questions, tuple | list) and bool(questions) and all(isinstance(turn, Turn) for turn in questions))
    several = [questions] if is_one else questions
    if not isinstance(several, Sequence):
        raise InputError(f"questions must be a text, a conversation or a list of them, got {type(questions).__name__}")
    found: list[Conversation] = []
    for one in several:
        turns = (Turn("user", one),) if isinstance(one, str) else one
        if not isinstance(turns, tuple | list) or not turns or not all(isinstance(turn, Turn) for turn in turns):
            raise InputError("a question must be a text or a conversation such as (Turn('user', 'what is it?'),), got "
                             f"{shown(one)}")
        found.append(tuple(turns))
    return found


def asked_about(
    cache: VocoCache, questions: Questions, units: Sequence[Sequence[int]] | None
) -> tuple[list[Sequence[int]], list[Conversation]]:
    """Returns each question's units of a cache, and the questions as conversations.

    Args:
      cache: holds the units.
      questions: see `conversations_of`.
      units: for each question the units it is about, or one list for one question; None for all units.

    Raises:
      InputError: they do not fit each other, or a question is about no unit.
    """
    if not isinstance(cache, VocoCache):
        raise InputError(f"cache must be a VocoCache, got {type(cache).__name__}: Assistant.compress(images) makes it, "
                         "Assistant.answer(images, questions) asks about images at once")
    asked = conversations_of(questions)
    about: list[Sequence[int]] = [range(cache.num_units)] * len(asked)
    if units is not None:
        is_one = len(asked) == 1 and all(isinstance(unit, int | np.integer) for unit in units)
        about = [units] if is_one and units else list(units)  # type: ignore[list-item]
    if len(about) != len(asked) or any(isinstance(own, int | np.integer) for own in about):
        raise InputError(f"units must be one list per question, got {shown(units)} for {len(asked)} questions")
    if asked and all(about):
        return about, asked
    raise not_about(cache, about)
