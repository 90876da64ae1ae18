"""A harness's messages and generation settings, as requests."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vocojax.data.conversation import Turn
from vocojax.errors import InputError, VocojaxError, shown
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.requests import Request
from vocojax.inference.visuals import VisualSource

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """What one role says.

    Attributes:
      role: `system`, `user` or `assistant`.
      texts: pieces of its text, in their order.
      visuals: images and videos, in their order.
    """

    role: str
    texts: tuple[str, ...] = ()
    visuals: tuple[VisualSource, ...] = ()


def request_of(messages: Sequence[Message], sampling: SamplingConfig) -> Request:
    """Returns messages as a request.

    A prompt of this model holds all visuals before the text, so places of images between texts are not kept. Pieces of
    text are joined by newlines. Messages of one role that follow one another are one turn.

    Raises:
      InputError: a role is unknown.
    """
    odd = [message.role for message in messages if message.role not in ROLES]
    if odd:
        raise InputError(f"a message has the role {odd[0]!r}; known: {', '.join(ROLES)}")
    turns = []
    for role, own in itertools.groupby(messages, key=lambda message: message.role):
        texts = [text for message in own for text in message.texts if text]
        turns.append(Turn(role, "\n".join(texts)))  # type: ignore[arg-type]
    visuals = tuple(visual for message in messages for visual in message.visuals)
    return Request(tuple(turns), visuals, sampling)


class Generation(NamedTuple):
    """A harness's generation settings as they are understood.

    Attributes:
      sampling: the settings that are followed.
      unused: settings that are not followed, by name: unknown ones, and a length limit that is too large.
    """

    sampling: SamplingConfig
    unused: dict[str, Any]


def generation_of(settings: Mapping[str, Any], max_new_tokens: int, seed: int, longest: int) -> Generation:
    """Reads generation settings under the names of transformers and of lm-evaluation-harness.

    As in transformers, `do_sample=False` takes the likeliest tokens, whatever the temperature. A setting that is None
    is not set.

    Args:
      settings: `max_new_tokens`, `until`, `temperature`, `top_p`, `top_k`, `do_sample`, `repetition_penalty`, `seed`;
        `num_beams` must be 1.
      max_new_tokens: where the settings do not say it.
      seed: where the settings do not say it.
      longest: the most tokens that an answer may have: room for them is made before the first one.

    Raises:
      InputError: a setting can't be followed.
    """
    left = {name: value for name, value in settings.items() if value is not None}
    beams = left.pop("num_beams", 1)
    if beams != 1:
        raise InputError(f"num_beams is {beams!r}, but beam search is not supported; set num_beams=1")
    limit = left.pop("max_new_tokens", max_new_tokens)
    if isinstance(limit, int) and limit > longest:
        left["max_new_tokens"], limit = limit, longest
    draws = left.pop("do_sample", None)
    temperature = left.pop("temperature", 1.0 if draws else 0.0)
    greedy = draws is False or temperature == 0
    until = left.pop("until", ())
    chosen = {
        "max_new_tokens": limit, "seed": left.pop("seed", seed),
        "stop": (until,) if isinstance(until, str) else tuple(until) if isinstance(until, Sequence) else until,
        "repetition_penalty": left.pop("repetition_penalty", 1.0),
    }
    draw = {"temperature": temperature, "top_p": left.pop("top_p", 1.0), "top_k": left.pop("top_k", 0)}
    try:
        return Generation(SamplingConfig(**chosen, **({} if greedy else draw)), left)
    except VocojaxError as error:
        raise InputError(f"generation settings {shown(dict(settings))}: {error}") from error
