"""The prompt layout, and which token may see which. No other module decides either. Host side, numpy.

A sample is k visual units followed by one or more threads of text about them:

    unit   = [BOS] [V_1 ... V_n] [newline] [<voco> x N]
    sample = unit_1 ... unit_k  thread_1 ... thread_m        a thread of text begins with its own newline token

Several threads (questions about the same images) share the units' VoCo tokens and do not see each other. A sample
without units is one thread that begins with BOS. Visibility is two integer vectors (`View.start`, `View.stop`): query i
may attend to key j iff `start[i] <= j <= i and i < stop[j]`. For one unit (n = 3, N = 2) and two threads:

    query \\ key  B V V V n C C | t t | u u
      unit       causal inside the unit
      t          . . . . . x x   x x   . .        `voco`: text sees the VoCo tokens of its units and its own thread
      u          . . . . . x x   . .   x x
      t          x x x x x x x   x x   . .        `causal`: text sees whole units as well (upper bound, baselines)
"""

import enum
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np

from vocojax.config import ModelConfig, Positions, VocoPlaces, VocoSees
from vocojax.errors import VocojaxError, shown
from vocojax.view import View, close_bands

Visibility = Literal["voco", "causal"]
VISIBILITIES: tuple[Visibility, ...] = get_args(Visibility)
IGNORE = -100  # label of a token that is not a target; the usual value in PyTorch code


class Role(enum.IntEnum):
    """The kind of a token."""

    PAD = 0
    BOS = 1
    VISION = 2
    NEWLINE = 3
    VOCO = 4
    TEXT = 5


class Span(NamedTuple):
    """A piece of a thread's text, as a template writes it.

    Attributes:
      text: the piece.
      is_target: whether its tokens are targets.
    """

    text: str
    is_target: bool = False


class Encoded(NamedTuple):
    """An encoded text.

    Attributes:
      ids: token ids.
      ends: for each token, the index of the character after its last one.
    """

    ids: list[int]
    ends: list[int]


class TextTokenizer(Protocol):
    """A tokenizer, as the layout uses it.

    Attributes:
      bos_id: id of BOS.
      voco_id: id of the VoCo token.
      voco_token: text of the VoCo token.
    """

    bos_id: int
    voco_id: int
    voco_token: str

    def encode(self, text: str) -> Encoded:
        """Encodes a text. Adds no BOS; turns the text of a special token into its id."""
        ...


class UnitShape(NamedTuple):
    """The numbers of tokens in a unit.

    Attributes:
      tokens: vision tokens of one image, or a baseline's compressed tokens.
      vocos: VoCo tokens after them, N.
      positions: how the tokens of several units are numbered, see `VocoConfig`.
      question: the most tokens of the question that the image is compressed for (the last ones count); 0 for none.
      places: rotary positions of the VoCo tokens in their unit, see `VocoConfig`.
      sees: which vision tokens a VoCo token sees, see `VocoConfig`.
    """

    tokens: int
    vocos: int
    positions: Positions = "compact"
    question: int = 0
    places: VocoPlaces = "end"
    sees: VocoSees = "unit"

    def stride(self, length: int) -> int:
        """Returns by how much each unit's positions are higher than those of the unit before it.

        Args:
          length: number of tokens of a unit, its BOS and newline included.
        """
        return self.vocos if self.positions == "compact" else length


def unit_shape(model: ModelConfig) -> UnitShape:
    """Returns the shape of a model's units."""
    voco = model.voco
    return UnitShape(model.unit_tokens, model.unit_vocos, voco.positions, model.question_tokens, voco.places, voco.sees)


class LayoutError(VocojaxError, ValueError):
    """A sample that can't be laid out; the message names the record.

    Attributes:
      reason: a short key by which such samples are counted.
    """

    def __init__(self, record: str, problem: str, reason: str):
        self.reason = reason
        super().__init__(f"record {shown(record)}: {problem}")


@dataclass(frozen=True)
class SampleLayout:
    """One sample, token by token. All arrays have length S.

    Attributes:
      record: the sample's name, for errors.
      unit: numbers of vision tokens and VoCo tokens in a unit.
      ids: int32, token ids. Vision tokens hold the BOS id, which is never read.
      roles: int8, `Role` of each token.
      labels: int32, the token's id if it is a target, else `IGNORE`. Not shifted: token i is predicted at i - 1.
      threads: int32, number of the token's thread of text; -1 in units.
      num_units: number of units before the text, k.
      unit_length: number of tokens of a unit; the first `num_units * unit_length` tokens are units.
      dropped: number of text tokens that were cut off the end.
      question: token ids of the question that the units are compressed for, at most `unit.question`.
      unread: number of each unit's last VoCo tokens that text does not see; it has the positions that it has after a
        cache of the others.
    """

    record: str
    unit: UnitShape
    ids: np.ndarray
    roles: np.ndarray
    labels: np.ndarray
    threads: np.ndarray
    num_units: int
    unit_length: int
    dropped: int = 0
    question: tuple[int, ...] = ()
    unread: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Number of targets."""
        return int((self.labels != IGNORE).sum())

    @property
    def text_start(self) -> int:
        """Index of the first text token."""
        return self.num_units * self.unit_length

    def seen_by_text(self, visibility: Visibility) -> np.ndarray:
        """Returns bool [num_units * unit_length]: the tokens of the units that text sees and a cache must hold."""
        place = np.arange(self.text_start) % max(self.unit_length, 1)  # VoCo tokens are a unit's last ones
        is_read = (self.roles[: self.text_start] == Role.VOCO) & (place < self.unit_length - self.unread)
        return is_read | (visibility == "causal")

    def view(self, visibility: Visibility) -> View:
        """Returns positions and visibility of the whole sample.

        Threads never see each other. All have the same positions, as if each were alone after the units.

        Args:
          visibility: `voco`: text sees only the VoCo tokens of the units, and a unit sees only itself. Unit t has the
            positions of a single unit, t strides higher (`UnitShape.stride`); text follows the last unit. `causal`:
            everything earlier in the sample is visible, and positions count all tokens.
        """
        length, units_end = len(self), self.text_start
        unit_index = np.minimum(np.arange(length) // max(self.unit_length, 1), self.num_units)
        in_unit = np.arange(length) < units_end
        if units_stand_alone(visibility):
            read_length = self.unit_length - self.unread
            stride = self.unit._replace(vocos=self.unit.vocos - self.unread).stride(read_length)
            text_position = read_length + (self.num_units - 1) * stride if self.num_units else 0
            start = np.where(in_unit, unit_index * self.unit_length, 0)
        else:
            stride = self.unit_length
            text_position = units_end
            start = np.zeros(length, np.int64)
        stop = np.full(length, length)
        hidden = np.flatnonzero(~self.seen_by_text(visibility))
        stop[hidden] = (unit_index[hidden] + 1) * self.unit_length
        positions = np.arange(length) - unit_index * (self.unit_length - stride)
        if units_stand_alone(visibility) and self.unit.vocos and (self.unit.places, self.unit.sees) != ("end", "unit"):
            self._place_vocos(positions, start, stop)
        thread_starts, thread_ends = self.thread_bounds()
        for first, end in zip(thread_starts, thread_ends, strict=True):
            positions[first:end] = text_position + np.arange(end - first)
            stop[first:end] = end
        return View(positions.astype(np.int32), start.astype(np.int32), stop.astype(np.int32))

    def _place_vocos(self, positions: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None:
        """Writes what `UnitShape.places` and `UnitShape.sees` change into a view's arrays."""
        unit, number_N = self.unit, np.arange(self.unit.vocos)
        first_U1 = self.unit_length * np.arange(self.num_units)[:, None]
        voco_UN = first_U1 + self.unit_length - unit.vocos + number_N
        if unit.places == "spread":
            positions[voco_UN] = positions[first_U1] + 1 + (2 * number_N + 1) * unit.tokens // (2 * unit.vocos)
        if unit.sees == "band":
            close_bands(start, stop, first_U1 + 1 + np.arange(unit.tokens), voco_UN)

    def view_after_prefix(self, visibility: Visibility, prefix_length: int) -> View:
        """Returns positions and visibility of the text alone, after a prefix of cached tokens that replaces the units.

        The prefix holds the units' VoCo tokens (with `causal`, all their tokens) in their order, then padding that no
        token sees. Each query has the position that it has in the whole sample, and sees the same text. For one unit
        (N = 2), a prefix of four tokens and two threads:

            query \\ key  C C . . | t t | u u
              t           x x . .   x . | . .
              t           x x . .   x x | . .
              u           x x . .   . . | x .
              u           x x . .   . . | x x

        Args:
          visibility: see `view`.
          prefix_length: number of cached tokens and padding, P.
        """
        whole, text_start = self.view(visibility), self.text_start
        is_seen = self.seen_by_text(visibility)
        seen = np.flatnonzero(is_seen[is_seen | (self.roles[:text_start] == Role.VOCO)])
        size = len(self) - text_start
        stop = np.arange(prefix_length + size, dtype=np.int32)
        stop[seen] = prefix_length + size
        stop[prefix_length:] = whole.stop[text_start:] - text_start + prefix_length
        return View(whole.positions[text_start:], np.zeros(size, np.int32), stop)

    def thread_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first index of every thread, and the index after its last token."""
        starts = self.text_start + np.flatnonzero(np.diff(self.threads[self.text_start :], prepend=-1))
        return starts, np.append(starts[1:], len(self))[: len(starts)]


def lay_out_sample(
    record: str,
    num_units: int,
    threads: Sequence[Sequence[Span]],
    tokenizer: TextTokenizer,
    unit: UnitShape,
    max_length: int,
    question: str = "",
) -> SampleLayout:
    """Lays out one sample.

    Args:
      record: the sample's name, for errors.
      num_units: number of images (or frames) of the sample, k >= 0.
      threads: texts about the units, each a list of spans from a template.
      tokenizer: see `TextTokenizer`.
      unit: numbers of vision tokens and VoCo tokens in a unit.
      max_length: the sample's maximum of tokens; further text is dropped and counted in `dropped`.
      question: the text that the units are compressed for, if `unit` has room for one.

    Raises:
      LayoutError: there is no thread, there are several threads without a unit or about units that are compressed for
        one question, the units are longer than `max_length`, a text contains the VoCo token, or, without VoCo tokens, a
        thread after the first begins with a target.
    """
    if not threads:
        raise LayoutError(record, "has no text", "no text")
    if len(threads) > 1 and num_units == 0:
        raise LayoutError(record, "has several threads without an image; write each as a sample of its own",
                          "threads without unit")
    if unit.question and len(threads) > 1:
        raise LayoutError(record, "has several threads, and its images are compressed for one question: set "
                          "data.threads_per_sample=1", "several questions")
    if not unit.vocos and any(thread and thread[0].is_target for thread in threads[1:]):
        raise LayoutError(record, "a thread after the first begins with a target, which no token precedes without VoCo "
                          "tokens; begin the thread with a question", "target first")
    unit_ids, unit_roles = _unit_tokens(tokenizer, unit)
    bodies = _encode_threads(record, threads, tokenizer, unit.vocos, bool(num_units))
    room = max_length - num_units * len(unit_ids)
    if room < 1:
        raise LayoutError(record, f"its {num_units} units have {num_units * len(unit_ids)} tokens, which leaves no "
                          f"room for text in a row of {max_length}: use fewer images or a longer row", "units too long")
    head_ids, head_roles = np.tile(unit_ids, num_units), np.tile(unit_roles, num_units)
    if not num_units:
        head_ids, head_roles = np.array([tokenizer.bos_id], np.int32), np.array([Role.BOS], np.int8)
    text_ids, is_target = (np.concatenate(parts) for parts in zip(*bodies, strict=True))
    ids = np.concatenate([head_ids, text_ids])
    roles = np.concatenate([head_roles, np.full(len(text_ids), Role.TEXT, np.int8)])
    labels = np.concatenate([np.full(len(head_ids), IGNORE, np.int32), np.where(is_target, text_ids, IGNORE)])
    owners = np.repeat(np.arange(-1, len(bodies), dtype=np.int32), [len(head_ids), *(len(b[0]) for b in bodies)])
    if not num_units:
        owners[0] = 0
    kept = slice(0, max_length)
    return SampleLayout(
        record=record,
        unit=unit,
        ids=ids[kept],
        roles=roles[kept],
        labels=labels[kept],
        threads=owners[kept],
        num_units=num_units,
        unit_length=len(unit_ids) if num_units else 0,
        dropped=max(0, len(ids) - max_length),
        question=tuple(tokenizer.encode(question).ids[-unit.question :]) if unit.question else (),
    )


def require_targets(sample: SampleLayout) -> SampleLayout:
    """Returns the sample unchanged.

    Raises:
      LayoutError: the sample has no target, so training on it would have no effect.
    """
    if not (sample.labels != IGNORE).any():
        cause = (f"truncation dropped {sample.dropped} text tokens and all targets with them: use a longer row"
                 if sample.dropped else "no answer in its conversation has a target")
        raise LayoutError(sample.record, cause, "truncated away" if sample.dropped else "no target")
    return sample


def units_stand_alone(visibility: Visibility) -> bool:
    """Returns whether a unit sees nothing outside itself, so that it can be computed alone and placed anywhere."""
    return visibility == "voco"


def lay_out_unit(record: str, tokenizer: TextTokenizer, unit: UnitShape) -> SampleLayout:
    """Lays out one unit without text, to be compressed."""
    ids, roles = _unit_tokens(tokenizer, unit)
    nothing = np.full(len(ids), IGNORE, np.int32)
    outside = np.full(len(ids), -1, np.int32)
    return SampleLayout(record, unit, ids.copy(), roles.copy(), nothing, outside, 1, len(ids))


def _lead(tokenizer: TextTokenizer, vocos: int) -> tuple[str, int]:
    """Returns the text between an image and its conversation, and how many of its characters belong to the unit."""
    return ("\n" + tokenizer.voco_token + "\n", 1) if vocos else ("\n", 1)


def _unit_tokens(tokenizer: TextTokenizer, unit: UnitShape) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids (int32) and roles (int8) of a unit's tokens, read-only."""
    lead, unit_end = _lead(tokenizer, unit.vocos)
    encoded = tokenizer.encode(lead)
    newline = tuple(token for token, end in zip(encoded.ids, encoded.ends, strict=True) if end <= unit_end)
    return _unit_arrays(unit, tokenizer.bos_id, newline, tokenizer.voco_id)


@functools.lru_cache(maxsize=8)
def _unit_arrays(unit: UnitShape, bos_id: int, newline: tuple[int, ...], voco_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `_unit_tokens` does; kept, because all samples have the same."""
    ids = np.array([bos_id] * (1 + unit.tokens) + list(newline) + [voco_id] * unit.vocos, np.int32)
    roles = np.repeat(np.array([Role.BOS, Role.VISION, Role.NEWLINE, Role.VOCO], np.int8),
                      [1, unit.tokens, len(newline), unit.vocos])
    ids.flags.writeable = roles.flags.writeable = False
    return ids, roles


def _encode_threads(
    record: str, threads: Sequence[Sequence[Span]], tokenizer: TextTokenizer, vocos: int, has_units: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns each thread's tokens, int32, and whether each is a target, bool.

    A thread is encoded as one text, "newline, <voco>, newline, text". Tokenizers that mark the beginning of a text
    (sentencepiece) then give the same ids as for the released code's prompt string. Without VoCo tokens the prompt is
    LLaVA's, "newline, text"; without units it is the text alone.
    """
    lead, unit_end = _lead(tokenizer, vocos) if has_units else ("", 0)
    bodies = []
    for spans in threads:
        encoded = tokenizer.encode(lead + "".join(span.text for span in spans))
        if encoded.ids.count(tokenizer.voco_id) != lead.count(tokenizer.voco_token):
            raise LayoutError(record, f"its text contains the reserved token {tokenizer.voco_token!r}; remove it",
                              "reserved token")
        bounds = np.array(list(itertools.accumulate((len(span.text) for span in spans), initial=len(lead))))
        ids, ends = np.array(encoded.ids, np.int32), np.array(encoded.ends)
        # A token belongs to the span that holds its last character.
        is_target = np.array([False, *(span.is_target for span in spans)])[np.searchsorted(bounds, ends, side="left")]
        kept = (ends > unit_end) & (ids != tokenizer.voco_id)
        bodies.append((ids[kept], is_target[kept]))
    return bodies
