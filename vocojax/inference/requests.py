"""Requests and answers: the types that evaluation, serving and scripts share."""

from dataclasses import dataclass

import numpy as np

from vocojax.data.conversation import Conversation, Turn
from vocojax.errors import InputError
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.decoding.sampling import GREEDY, SamplingConfig
from vocojax.inference.decoding.text import FinishReason
from vocojax.inference.visuals import VisualSource


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
