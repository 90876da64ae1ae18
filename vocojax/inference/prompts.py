"""Prompts as rows: laid-out samples whose last turn waits for an answer, padded to one length.

A prompt is laid out once (`layout.py`) and read in either of two ways: whole, with its units, or after a cache that
holds what text sees of them. Positions and visibility are the same in both.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from vocojax.config import ModelConfig
from vocojax.data.conversation import Conversation, Template, is_unicode, require_turns
from vocojax.data.packing import Item, RowShape, pack_row
from vocojax.data.tokenizer import Tokenizer
from vocojax.inference.decoding.decode import Prompts
from vocojax.layout import LayoutError, Role, SampleLayout, UnitShape, Visibility, lay_out_sample
from vocojax.models.voco import Rows, rows_from_batch
from vocojax.parallel.mesh import row_multiple
from vocojax.view import View


def lay_out_prompt(
    record: str,
    num_units: int,
    conversation: Conversation,
    template: Template,
    tokenizer: Tokenizer,
    unit: UnitShape,
    max_length: int,
) -> SampleLayout:
    """Lays out a conversation whose last turn is the user's.

    Args:
      record: the name used in errors.
      num_units: units before the text.
      conversation: its turns; a system turn, if any, comes first.
      template: writes it out.
      tokenizer: see `layout.TextTokenizer`.
      unit: tokens and VoCo tokens per unit.
      max_length: the longest prompt in tokens, units included.

    Raises:
      LayoutError: it does not end with a question, its roles are out of turn, it can't be written as UTF-8, or it is
        longer than `max_length` (a prompt is never truncated).
    """
    if not conversation or conversation[-1].role != "user":
        raise LayoutError(record, "must end with the user's turn to be answered", "no question")
    require_turns(record, conversation)
    if not all(is_unicode(turn.text) for turn in conversation):
        raise LayoutError(record, "is not UTF-8", "not UTF-8")
    spans = template.spans(conversation, tokenizer.eos_token, num_units > 0)
    sample = lay_out_sample(record, num_units, [spans], tokenizer, unit, max_length,
                            template.question(conversation, num_units > 0))
    if sample.dropped:
        raise LayoutError(record, f"its prompt has {len(sample) + sample.dropped} tokens, more than the {max_length} "
                          "there is room for: shorten it, ask about fewer images or frames, or raise max_length",
                          "prompt too long")
    return sample


def prompt_text(sample: SampleLayout, tokenizer: Tokenizer) -> str:
    """Returns a laid-out prompt as text, special tokens included; each image's vision tokens are one placeholder."""
    pieces, place = [], 0
    for is_vision, run in itertools.groupby((sample.roles == Role.VISION).tolist()):
        length = len(list(run))
        ids, place = sample.ids[place : place + length].tolist(), place + length
        pieces.append(f"<image x {length}>" if is_vision else str(tokenizer.huggingface.decode(ids)))
    return "".join(pieces)


def whole_rows(
    samples: Sequence[SampleLayout],
    images: Sequence[Sequence[np.ndarray]],
    model: ModelConfig,
    visibility: Visibility,
    length: int,
) -> Rows:
    """Packs whole samples (or units alone), one to a row.

    Args:
      samples: laid out with the model's own unit shape.
      images: of each sample one uint8 [size, size, 3] array per unit.
      model: of the model that reads them.
      visibility: who sees whom.
      length: of the rows, in tokens.
    """
    slots = max(map(len, images), default=0)
    shape = RowShape(length, slots, length, model.vision.image_size, model.unit_tokens, (("", visibility),),
                     model.question_tokens)
    packed = [pack_row([Item(s, tuple(i))], shape) for s, i in zip(samples, images, strict=True)]
    return rows_from_batch({key: np.stack([row[key] for row in packed]) for key in packed[0]})  # type: ignore[misc]


def whole_prompts(
    samples: Sequence[SampleLayout],
    images: Sequence[Sequence[np.ndarray]],
    model: ModelConfig,
    visibility: Visibility,
    length: int,
) -> Prompts:
    """Packs whole prompts, one to a row; arguments as those of `whole_rows`."""
    rows = whole_rows(samples, images, model, visibility, length)
    return _prompts(rows, [s.view(visibility) for s in samples], [s.text_start for s in samples])


def text_prompts(
    samples: Sequence[SampleLayout], visibility: Visibility, prefix_length: int, length: int
) -> Prompts:
    """Packs the text of prompts alone, one to a row, after cached tokens in place of their units.

    Args:
      samples: laid out with units whose VoCo tokens are those that are cached.
      visibility: who sees whom.
      prefix_length: cached tokens of a row and padding; see `SampleLayout.view_after_prefix`.
      length: of the rows without the prefix, in tokens.
    """
    views = [sample.view_after_prefix(visibility, prefix_length) for sample in samples]
    index = np.arange(prefix_length + length, dtype=np.int32)
    ids, positions = np.zeros((2, len(samples), length), np.int32)
    start, stop = np.tile(index[prefix_length:], (len(samples), 1)), np.tile(index, (len(samples), 1))
    for row, (sample, view) in enumerate(zip(samples, views, strict=True)):
        size = len(view.positions)
        ids[row, :size], positions[row, :size] = sample.ids[sample.text_start :], view.positions
        start[row, :size], stop[row, : prefix_length + size] = view.start, view.stop
    no_vision, no_images = np.full_like(ids, -1), np.zeros((len(samples), 0, 1, 1, 3), np.uint8)
    rows = Rows(ids, positions, start, stop, no_vision, no_images)  # type: ignore[arg-type]
    return _prompts(rows, views, [0] * len(samples))


def _prompts(rows: Rows, views: Sequence[View], text_starts: Sequence[int]) -> Prompts:
    answers = [view.answer() for view in views]
    sees_BK = np.zeros(rows.stop_BK.shape, bool)
    for row, answer in enumerate(answers):
        sees_BK[row, : len(answer.sees)] = answer.sees
    lengths, positions = [len(view.positions) for view in views], [answer.position for answer in answers]
    lengths_B, text_start_B, position_B = (np.array(x, np.int32) for x in (lengths, text_starts, positions))
    return Prompts(rows, lengths_B, text_start_B, position_B, sees_BK)  # type: ignore[arg-type]


def bucket(length: int) -> int:
    """Rounds a length up, so that few row lengths are ever compiled: to a multiple of 32 up to 128 tokens, beyond that
    to a quarter of the power of two below it. At most a fifth of a long row is padding."""
    step = max(32, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def filled(rows: Sequence, count: int) -> list:
    """Repeats the last row up to `count` rows, so that few programs serve all batch sizes."""
    return [*rows, *[rows[-1]] * (count - len(rows))]


def batch_bucket(rows: int) -> int:
    """Rounds a number of rows up to a power of two that the devices of the mesh in force share evenly."""
    multiple = row_multiple()
    return multiple * (1 << max(0, (-(-rows // multiple) - 1).bit_length()))
