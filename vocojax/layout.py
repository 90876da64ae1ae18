"""The prompt layout and who may see whom. Nothing else in the package decides either. Host side, numpy.

A sample is k visual units followed by one or more threads of text about them:

    unit   = [BOS] [V_1 ... V_n] [newline] [<voco> x N]
    sample = unit_1 ... unit_k  thread_1 ... thread_m        a thread of text opens with its own newline token

Several threads (questions about the same images) share the units' VoCo tokens and do not see each other. Without units
a sample is one thread that opens with BOS. Visibility is two integer vectors (`View.start`, `View.stop`): query i may
attend to key j iff `start[i] <= j <= i and i < stop[j]`. For one unit (n = 3, N = 2) and two threads:

    query \\ key  B V V V n C C | t t | u u
      unit       causal inside the unit
      t          . . . . . x x   x x   . .        `voco`: text sees the VoCo tokens of its units and its own thread
      u          . . . . . x x   . .   x x
      t          x x x x x x x   x x   . .        `causal`: text sees whole units as well (upper bound, baselines)
"""

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from vocojax.config import ModelConfig
from vocojax.errors import VocojaxError

Visibility = Literal["voco", "causal"]
IGNORE = -100  # the label of a token that is no target, as everywhere in the field


class Role(enum.IntEnum):
    """The kind of a token."""

    PAD = 0
    BOS = 1
    VISION = 2
    NEWLINE = 3
    VOCO = 4
    TEXT = 5


class Span(NamedTuple):
    """A piece of a thread's text as a template writes it.

    Attributes:
      text: the piece.
      is_target: whether its tokens are trained on.
    """

    text: str
    is_target: bool = False


class Encoded(NamedTuple):
    """An encoded text.

    Attributes:
      ids: token ids.
      ends: for each token the index of the character after its last one.
    """

    ids: list[int]
    ends: list[int]


class TextTokenizer(Protocol):
    """A tokenizer, as the layout needs it. `encode` adds no BOS and recognises special tokens that are written out."""

    bos_id: int
    voco_id: int
    voco_token: str

    def encode(self, text: str) -> Encoded: ...


class UnitShape(NamedTuple):
    """Numbers of tokens that stand for one image.

    Attributes:
      tokens: vision tokens of a unit, or a baseline's compressed tokens.
      vocos: VoCo tokens after them, N.
    """

    tokens: int
    vocos: int


def unit_shape(model: ModelConfig) -> UnitShape:
    """Returns the shape of the units that a model is trained on."""
    return UnitShape(model.unit_tokens, model.unit_vocos)


class LayoutError(VocojaxError, ValueError):
    """A sample that can't be laid out; the message names the record.

    Attributes:
      reason: a short key under which such samples are counted.
    """

    def __init__(self, record: str, problem: str, reason: str):
        self.reason = reason
        super().__init__(f"record {record!r}: {problem}")


class AnswerView(NamedTuple):
    """The position of an answer's first token, and what its tokens see of the prompt.

    Attributes:
      position: rotary position; the answer's further tokens are numbered on from it.
      sees: bool [P + S], the keys of the prefix and the prompt that every answer token sees. An answer token also sees
        the answer up to itself.
    """

    position: int
    sees: np.ndarray


class View(NamedTuple):
    """Positions and visibility of S tokens that stand after a prefix of P others (P = 0 for a whole sample).

    Query r has index P + r, keys are counted from the prefix's first one.

    Attributes:
      positions: int32 [S], rotary positions.
      start: int32 [S], the first key of each query's window.
      stop: int32 [P + S], the first query that no longer sees each key.
    """

    positions: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def answer(self) -> AnswerView:
        """Returns how an answer to the prompt reads it: it sees what the prompt's last token sees."""
        last = len(self.stop) - 1
        sees = (self.start[-1] <= np.arange(last + 1)) & (last < self.stop)
        return AnswerView(int(self.positions[-1]) + 1, sees)


@dataclass(frozen=True)
class SampleLayout:
    """One sample, token by token. All arrays have length S.

    Attributes:
      record: the name used in errors.
      unit: tokens and VoCo tokens per unit.
      ids: int32; vision tokens hold the BOS id, which nothing reads.
      roles: int8 `Role`.
      labels: int32, a target's own id, elsewhere `IGNORE` (not shifted: token i is predicted at i - 1).
      threads: int32, which thread of text a token belongs to, -1 inside units.
      num_units: units before the text, k.
      unit_length: tokens of a unit; the first `num_units * unit_length` tokens are units.
      dropped: text tokens that truncation cut off the end.
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

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are trained on."""
        return int((self.labels != IGNORE).sum())

    @property
    def text_start(self) -> int:
        """Index of the first text token."""
        return self.num_units * self.unit_length

    def seen_by_text(self, visibility: Visibility) -> np.ndarray:
        """Returns bool [num_units * unit_length]: which tokens of the units text sees, and a cache must hold."""
        return (self.roles[: self.text_start] == Role.VOCO) | (visibility == "causal")

    def view(self, visibility: Visibility) -> View:
        """Returns positions and visibility of the whole sample.

        `voco`: text sees, of the units, only VoCo tokens, and a unit sees only itself. Positions are compact: unit t
        is numbered as if it stood alone, shifted by t*N, so that the VoCo tokens of all units are consecutive.
        `causal`: everything earlier in the sample is visible and units are numbered one after the other.
        Threads never see each other and are numbered alike, as if each stood alone after the units.
        """
        length, units_end = len(self), self.text_start
        unit_index = np.minimum(np.arange(length) // max(self.unit_length, 1), self.num_units)
        in_unit = np.arange(length) < units_end
        if units_stand_alone(visibility):
            stride = self.unit.vocos
            text_position = self.unit_length + (self.num_units - 1) * stride if self.num_units else 0
            start = np.where(in_unit, unit_index * self.unit_length, 0)
        else:
            stride = self.unit_length
            text_position = units_end
            start = np.zeros(length, np.int64)
        stop = np.full(length, length)
        hidden = np.flatnonzero(~self.seen_by_text(visibility))
        stop[hidden] = (unit_index[hidden] + 1) * self.unit_length
        positions = np.arange(length) - unit_index * (self.unit_length - stride)
        thread_starts, thread_ends = self.thread_bounds()
        for first, end in zip(thread_starts, thread_ends, strict=True):
            positions[first:end] = text_position + np.arange(end - first)
            stop[first:end] = end
        return View(positions.astype(np.int32), start.astype(np.int32), stop.astype(np.int32))

    def view_after_prefix(self, visibility: Visibility, prefix_length: int) -> View:
        """Returns positions and visibility of the text alone, after cached tokens in place of the units.

        The prefix holds the tokens of the sample's units that text sees, in their order, then padding that nobody
        sees. Each query sees of the text what it sees in the whole sample, and has the same position. For one unit
        (N = 2), a prefix of four tokens and two threads:

            query \\ key  C C . . | t t | u u
              t           x x . .   x . | . .
              t           x x . .   x x | . .
              u           x x . .   . . | x .
              u           x x . .   . . | x x

        Args:
          visibility: under `causal` the cached tokens are whole units.
          prefix_length: cached tokens and padding.
        """
        whole, text_start = self.view(visibility), self.text_start
        cached = int(self.seen_by_text(visibility).sum())
        size = len(self) - text_start
        stop = np.arange(prefix_length + size, dtype=np.int32)
        stop[:cached] = prefix_length + size
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
) -> SampleLayout:
    """Lays out one sample.

    Args:
      record: the name used in errors.
      num_units: images (or frames) of the sample, k >= 0.
      threads: texts about the units, each a list of spans from a template.
      tokenizer: see `TextTokenizer`.
      unit: tokens and VoCo tokens per unit.
      max_length: text is dropped from the end beyond this many tokens; `dropped` says how many.

    Raises:
      LayoutError: no thread, several threads without a unit, units longer than `max_length`, or a text that spells
        the VoCo token.
    """
    if not threads:
        raise LayoutError(record, "has no text", "no text")
    if len(threads) > 1 and num_units == 0:
        raise LayoutError(record, "several threads need at least one unit to share", "threads without unit")
    if not unit.vocos and any(thread and thread[0].is_target for thread in threads[1:]):
        raise LayoutError(record, "a thread after another one must not open with a target: without VoCo tokens "
                          "nothing stands before it", "target first")
    unit_ids, unit_roles = _unit_tokens(tokenizer, unit)
    bodies = _encode_threads(record, threads, tokenizer, unit.vocos, bool(num_units))
    room = max_length - num_units * len(unit_ids)
    if room < 1:
        raise LayoutError(record, f"its {num_units} units take {num_units * len(unit_ids)} tokens, which leaves no "
                          f"room for text in a row of {max_length}: use fewer images or a longer row", "units too long")
    head_ids, head_roles = unit_ids * num_units, unit_roles * num_units
    if not num_units:
        head_ids, head_roles = [tokenizer.bos_id], [Role.BOS]
    text_ids, is_target = (np.concatenate(parts) for parts in zip(*bodies, strict=True))
    ids = np.concatenate([np.array(head_ids, np.int32), text_ids])
    roles = np.concatenate([np.array(head_roles, np.int8), np.full(len(text_ids), Role.TEXT, np.int8)])
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
    )


def require_targets(sample: SampleLayout) -> SampleLayout:
    """Returns the sample itself.

    Raises:
      LayoutError: none of its tokens is a target, so that training on it would teach nothing.
    """
    if not (sample.labels != IGNORE).any():
        cause = (f"truncation dropped {sample.dropped} text tokens and every target with them: use a longer row"
                 if sample.dropped else "no answer in its conversation has a target token")
        raise LayoutError(sample.record, cause, "truncated away" if sample.dropped else "no target")
    return sample


def units_stand_alone(visibility: Visibility) -> bool:
    """Returns whether a unit sees nothing outside itself, so that it can be computed alone and placed anywhere."""
    return visibility == "voco"


def lay_out_unit(record: str, tokenizer: TextTokenizer, unit: UnitShape) -> SampleLayout:
    """Lays out a unit alone, without text, to be compressed."""
    ids, roles = _unit_tokens(tokenizer, unit)
    nothing = np.full(len(ids), IGNORE, np.int32)
    outside = np.full(len(ids), -1, np.int32)
    return SampleLayout(record, unit, np.array(ids, np.int32), np.array(roles, np.int8), nothing, outside, 1, len(ids))


def _lead(tokenizer: TextTokenizer, vocos: int) -> tuple[str, int]:
    """Returns the text between an image and its conversation, and how many of its characters are the unit's."""
    return ("\n" + tokenizer.voco_token + "\n", 1) if vocos else ("\n", 1)


def _unit_tokens(tokenizer: TextTokenizer, unit: UnitShape) -> tuple[list[int], list[Role]]:
    lead, unit_end = _lead(tokenizer, unit.vocos)
    encoded = tokenizer.encode(lead)
    newline = [token for token, end in zip(encoded.ids, encoded.ends, strict=True) if end <= unit_end]
    ids = [tokenizer.bos_id] * (1 + unit.tokens) + newline + [tokenizer.voco_id] * unit.vocos
    roles = [Role.BOS] + [Role.VISION] * unit.tokens + [Role.NEWLINE] * len(newline) + [Role.VOCO] * unit.vocos
    return ids, roles


def _encode_threads(
    record: str, threads: Sequence[Sequence[Span]], tokenizer: TextTokenizer, vocos: int, has_units: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns every thread's tokens, int32, with their target flags.

    A thread is encoded whole, as "newline, <voco>, newline, text": tokenizers that mark the beginning of a text (the
    sentencepiece ones) then give the ids that the released code's prompt string has. Without VoCo tokens the prompt
    is LLaVA's own, "newline, text"; without units it is the text alone.
    """
    lead, unit_end = _lead(tokenizer, vocos) if has_units else ("", 0)
    bodies = []
    for spans in threads:
        encoded = tokenizer.encode(lead + "".join(span.text for span in spans))
        if encoded.ids.count(tokenizer.voco_id) != lead.count(tokenizer.voco_token):
            raise LayoutError(record, f"its text spells the reserved token {tokenizer.voco_token!r}", "reserved token")
        bounds = np.array(list(itertools.accumulate((len(span.text) for span in spans), initial=len(lead))))
        ids, ends = np.array(encoded.ids, np.int32), np.array(encoded.ends)
        # A token belongs to the span that holds its last character.
        is_target = np.array([False, *(span.is_target for span in spans)])[np.searchsorted(bounds, ends, side="left")]
        kept = (ends > unit_end) & (ids != tokenizer.voco_id)
        bodies.append((ids[kept], is_target[kept]))
    return bodies
