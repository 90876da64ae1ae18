"""Answer tokens as text: where an answer ends, and what of it may be shown while it is being written."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vocojax.data.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "stop_string", "error"]


class FinishedText(NamedTuple):
    """A finished answer.

    Attributes:
      text: without the string that ended it and without spaces around it.
      finish_reason: see `requests.Answer`.
      token_ids: the tokens before the end token, or up to the one that completed the string that ended the answer.
    """

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class AnswerText:
    """Reads the tokens of an answer.

    An answer ends before that of the stop strings which is complete first, so that it doesn't matter how often one
    looks; of two that are complete at once, before the longer one.

    Attributes:
      tokenizer: decodes the tokens.
      stops: strings that the caller wants the answer to end before.
      own_stop: what the template ends an answer with in addition to the end token, or ''.
    """

    tokenizer: Tokenizer
    stops: tuple[str, ...] = ()
    own_stop: str = ""

    def finish(self, ids: Sequence[int]) -> FinishedText:
        """Reads a complete answer, of which nothing follows the first end token."""
        text, stop = self._cut(ids)
        if stop:
            needed = bisect.bisect_left(range(len(ids)), True, key=lambda count: self.is_over(ids[:count]))
            reason: FinishReason = "stop" if stop == self.own_stop else "stop_string"
            return FinishedText(text.strip(), reason, tuple(ids[:needed]))
        said = self._before_end(ids)
        return FinishedText(text.strip(), "stop" if len(said) < len(ids) else "length", tuple(said))

    def is_over(self, ids: Sequence[int]) -> bool:
        """Returns whether an answer has reached one of the strings that end it."""
        return self.has_stops and self._cut(ids)[1] != ""

    def sure(self, ids: Sequence[int]) -> str:
        """Returns what later tokens can't change of an unfinished answer's text.

        That leaves out a character of which bytes are missing, what may turn out to begin a string that ends the
        answer, and spaces that may be its last.
        """
        text, stop = self._cut(ids)
        if not stop:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            begun = max((n for stop in self._all_stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
                        default=0)
            text = text[: len(text) - begun]
        return text.strip()

    @property
    def has_stops(self) -> bool:
        """True if some string ends an answer."""
        return bool(self._all_stops)

    @property
    def _all_stops(self) -> tuple[str, ...]:
        return (*self.stops, self.own_stop) if self.own_stop else self.stops

    def _before_end(self, ids: Sequence[int]) -> Sequence[int]:
        ids = list(ids)
        return ids[: ids.index(self.tokenizer.eos_id)] if self.tokenizer.eos_id in ids else ids

    def _cut(self, ids: Sequence[int]) -> tuple[str, str]:
        """Returns the text before the end token and the stop strings, and which of these ended it, or ''."""
        text = self.tokenizer.decode(self._before_end(ids))
        found = [(at + len(stop), at, stop) for stop in self._all_stops if (at := text.find(stop)) >= 0]
        return (text[: min(found)[1]], min(found)[2]) if found else (text, "")
