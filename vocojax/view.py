"""The vectors that say which position each token has and which tokens it sees. `layout` decides what they hold."""

from typing import NamedTuple

import numpy as np


class AnswerView(NamedTuple):
    """The position of an answer, and what its tokens see of the prompt.

    Attributes:
      position: rotary position of the answer's first token; its further tokens follow one by one.
      sees: bool [P + S], the keys of the prefix and of the prompt that each token of the answer sees. It also sees the
        answer up to itself.
    """

    position: int
    sees: np.ndarray


class View(NamedTuple):
    """The positions and the visibility of S tokens after a prefix of P tokens (P = 0 for a whole sample).

    Query r has index P + r; key 0 is the prefix's first token.

    Attributes:
      positions: int32 [S], rotary positions.
      start: int32 [S], the first key of each query's window.
      stop: int32 [P + S], the first query that no longer sees each key.
    """

    positions: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def answer(self) -> AnswerView:
        """Returns the view of an answer to the prompt: it sees what the prompt's last token sees."""
        last = len(self.stop) - 1
        sees = (self.start[-1] <= np.arange(last + 1)) & (last < self.stop)
        return AnswerView(int(self.positions[-1]) + 1, sees)


def close_bands(start: np.ndarray, stop: np.ndarray, vision_UP: np.ndarray, voco_UN: np.ndarray) -> None:
    """Lets each VoCo token see one band of its unit's vision tokens, see `VocoConfig.sees`.

    Two vectors describe bands if the first VoCo token sees the last one: `start` hides the bands before, and a band
    stops after its VoCo token. For three vision tokens and three VoCo tokens:

        query \\ key  B V V V n C C C
          first        . . . x x x
          second       . . x . x x x
          third        x x . . x x x x

    Args:
      start: as in `View`; written.
      stop: as in `View`; written.
      vision_UP: indices of the P vision tokens of each of U units.
      voco_UN: indices of their N VoCo tokens.
    """
    tokens, vocos = vision_UP.shape[1], voco_UN.shape[1]
    band_P = np.arange(tokens) * vocos // tokens
    stop[vision_UP] = voco_UN[:, ::-1][:, band_P] + 1
    start[voco_UN[:, :-1]] = vision_UP[:, np.searchsorted(band_P, np.arange(vocos - 1, 0, -1))]
