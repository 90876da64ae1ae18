"""Answer tokens as text: where an answer ends, and what of it may be shown while it is being written."""

from collections.abc import Sequence
from dataclasses import dataclass

from vocojax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class AnswerText:
    """Reads the tokens of answers.

    stops: an answer ends before that of these strings which is complete first, so that it doesn't matter how often one
      looks; of two that are complete at once, before the longer one.
    """

    tokenizer: Tokenizer
    stops: tuple[str, ...]

    def whole(self, ids: Sequence[int]) -> str:
        """The text of a finished answer, without spaces around it."""
        return self._cut(ids)[0].strip()

    def is_over(self, ids: Sequence[int]) -> bool:
        """Whether an answer has reached one of the strings that end it."""
        return bool(self.stops) and self._cut(ids)[1]

    def sure(self, ids: Sequence[int]) -> str:
        """What later tokens can't change of an unfinished answer's text: not a character of which bytes are missing,
        not what may turn out to begin a string that ends it, not spaces that may be its last."""
        text, is_over = self._cut(ids)
        if not is_over:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            begun = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            text = text[: len(text) - begun]
        return text.strip()

    def _cut(self, ids: Sequence[int]) -> tuple[str, bool]:
        """The text before the end token and the stops, and whether one of the stops is in it."""
        ids = list(ids)
        end = ids.index(self.tokenizer.eos_id) if self.tokenizer.eos_id in ids else len(ids)
        text = self.tokenizer.decode(ids[:end])
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        return (text[: min(found)[1]], True) if found else (text, False)
