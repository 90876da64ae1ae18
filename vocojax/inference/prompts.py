"""Prompts as rows: laid-out samples whose last turn waits for an answer, padded to one length.

A prompt is laid out once (`layout.py`) and read in either of two ways: whole, with its units, or behind a cache that
holds what text may see of them. Positions and visibility are the same in both.
"""

from collections.abc import Sequence

import numpy as np

from vocojax.config import ModelConfig
from vocojax.data.conversation import Conversation, Template
from vocojax.data.packing import Item, RowShape, pack_row
from vocojax.data.tokenizer import Tokenizer
from vocojax.layout import LayoutError, SampleLayout, UnitShape, Visibility, lay_out_sample
from vocojax.models.voco import Rows
from vocojax.parallel.mesh import row_multiple


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

    Raises:
      LayoutError: it does not end with a question, or is longer than `max_length` (a prompt is never truncated).
    """
    if not conversation or conversation[-1].role != "user":
        raise LayoutError(record, "must end with the user's turn to be answered", "no question")
    spans = template.spans(conversation, tokenizer.eos_token)
    sample = lay_out_sample(record, num_units, [spans], tokenizer, unit, max_length)
    if sample.dropped:
        raise LayoutError(record, f"its prompt has {len(sample) + sample.dropped} tokens, more than the {max_length} "
                          "there is room for: shorten it or raise max_length", "prompt too long")
    return sample


def whole_rows(
    samples: Sequence[SampleLayout],
    images: Sequence[Sequence[np.ndarray]],
    model: ModelConfig,
    visibility: Visibility,
    length: int,
) -> Rows:
    """Whole prompts, one to a row of `length` tokens; `images` holds one uint8 [size, size, 3] array per unit."""
    slots = max(map(len, images), default=0)
    shape = RowShape(length, slots, length, model.vision.image_size, model.unit_tokens, (("", visibility),))
    packed = [pack_row([Item(s, tuple(i))], shape) for s, i in zip(samples, images, strict=True)]
    return Rows(*(np.stack([row[key] for row in packed])  # type: ignore[arg-type]
                  for key in ("ids", "positions", "start", "stop", "vision", "images")))


def text_rows(
    samples: Sequence[SampleLayout], visibility: Visibility, cached_B: Sequence[int], prefix_length: int, length: int
) -> Rows:
    """The text of prompts alone, one to a row of `length` tokens, behind `prefix_length` cached tokens.

    Args:
      cached_B: how many of the prefix's tokens are the row's own; the rest is padding behind them.
    """
    end = prefix_length + length
    index = np.arange(end, dtype=np.int32)
    ids, positions = np.zeros((2, len(samples), length), np.int32)
    start, stop = np.tile(index[prefix_length:], (len(samples), 1)), np.tile(index, (len(samples), 1))
    for row, (sample, cached) in enumerate(zip(samples, cached_B, strict=True)):
        text = slice(sample.text_start, len(sample))
        size = len(sample) - sample.text_start
        ids[row, :size], positions[row, :size] = sample.ids[text], sample.view(visibility).positions[text]
        start[row, :size] = 0
        stop[row, :cached] = stop[row, prefix_length : prefix_length + size] = prefix_length + size
    no_vision, no_images = np.full_like(ids, -1), np.zeros((len(samples), 0, 1, 1, 3), np.uint8)
    return Rows(ids, positions, start, stop, no_vision, no_images)  # type: ignore[arg-type]


def bucket(length: int) -> int:
    """The length rounded up, so that few row lengths are ever compiled: to a multiple of 32 up to 128 tokens, beyond
    that to a quarter of the power of two below it. At most a fifth of a long row is padding."""
    step = max(32, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def batch_bucket(rows: int) -> int:
    """The number of rows rounded up to a power of two that the devices of the mesh in force share evenly."""
    multiple = row_multiple()
    return multiple * (1 << max(0, (-(-rows // multiple) - 1).bit_length()))
