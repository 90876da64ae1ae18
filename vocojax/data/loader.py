"""From a stage's data config to a stream of batches: read, decode, lay out, pack, batch. Grain drives it."""

import collections
import logging
import threading
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from vocojax.config import ConfigError, ModelConfig
from vocojax.data.config import DataConfig
from vocojax.data.conversation import Template, template
from vocojax.data.images import ImageError, load_image
from vocojax.data.packing import Item, PackedRows, RowShape, row_shape
from vocojax.data.sources import EasyVqaSource, LlavaSource, Source
from vocojax.data.sources.easy_vqa import EasyVqaCaptions
from vocojax.data.tokenizer import Tokenizer
from vocojax.layout import LayoutError, UnitShape, Visibility, lay_out_sample, require_targets

LOG = logging.getLogger(__name__)


class SkippedTooMany(RuntimeError):
    """More records were skipped than the data config allows."""


class Tally:
    """Counts records, skipped ones by reason, and dropped text tokens; threads may share it."""

    SHOWN = 20  # skipped records that are logged one by one
    TOLERANCE_FROM = 1000  # the share of skipped records is judged as if at least this many had been read

    def __init__(self, max_skipped_share: float):
        self.max_skipped_share = max_skipped_share
        self.records = 0
        self.dropped_tokens = 0
        self.skipped: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def use(self, dropped_tokens: int) -> None:
        """Counts a record that is used."""
        with self._lock:
            self.records += 1
            self.dropped_tokens += dropped_tokens

    def skip(self, error: LayoutError | ImageError) -> None:
        """Counts and logs a record that can't be used; `SkippedTooMany` once their share is over the limit."""
        with self._lock:
            self.records += 1
            self.skipped[error.reason] += 1
            total = self.skipped.total()
            if total <= self.SHOWN:
                LOG.warning("skipped: %s%s", error, " (further ones are only counted)" if total == self.SHOWN else "")
            if total > self.max_skipped_share * max(self.records, self.TOLERANCE_FROM):
                counts = ", ".join(f"{reason}: {count}" for reason, count in self.skipped.most_common())
                raise SkippedTooMany(
                    f"{total} of {self.records} records were skipped ({counts}), more than data.max_skipped_share "
                    f"{self.max_skipped_share:g} allows; the last one: {error}"
                )

    def scalars(self) -> dict[str, int]:
        """The counts, as metrics."""
        with self._lock:
            skipped = {f"data/skipped/{reason}": count for reason, count in self.skipped.items()}
            return {"data/records": self.records, "data/dropped_tokens": self.dropped_tokens, **skipped}


class PreparedSource:
    """A source's samples as packable items: images decoded, text laid out; None for a record that can't be used."""

    def __init__(self, source: Source, model: ModelConfig, data: DataConfig, tokenizer: Tokenizer, tally: Tally):
        self._source, self._data, self._tokenizer, self._tally = source, data, tokenizer, tally
        self._image_size = model.vision.image_size
        self._unit = unit_shape(model)
        self._template: Template = template(data.template)
        self._kept: dict[int, Item | None] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Item | None:
        if index in self._kept:
            return self._kept[index]
        item: Item | None = None
        try:
            item = self._prepare(index)
            self._tally.use(item.layout.dropped)
        except (LayoutError, ImageError) as error:
            self._tally.skip(error)
        if self._data.keep_in_memory:
            self._kept[index] = item
        return item

    def _prepare(self, index: int) -> Item:
        sample = self._source[index]
        if len(sample.images) > self._data.images_per_row:
            raise LayoutError(sample.id, f"has {len(sample.images)} images, a row has room for "
                              f"{self._data.images_per_row}: raise data.images_per_row", "too many images")
        threads = [self._template.spans(thread, self._tokenizer.eos_token) for thread in sample.threads]
        layout = require_targets(
            lay_out_sample(sample.id, len(sample.images), threads, self._tokenizer, self._unit, self._data.row_length)
        )
        images = tuple(load_image(path, self._image_size, self._data.fit) for path in sample.images)
        item = Item(layout, images)
        if item.num_targets > self._data.target_slots:
            raise LayoutError(sample.id, f"has {item.num_targets} targets, a row has room for "
                              f"{self._data.target_slots}: raise data.max_targets", "too many targets")
        return item


def unit_shape(model: ModelConfig) -> UnitShape:
    """Tokens and VoCo tokens of the units that a model is trained on."""
    return UnitShape(model.unit_tokens, model.unit_vocos)


def open_source(data: DataConfig) -> Source:
    """The source that a data config names."""
    if data.source == "llava":
        try:
            return LlavaSource(data.path, data.image_root)
        except (OSError, ValueError) as error:
            raise ConfigError("data.path", f"must be a LLaVA JSON: {error}") from error
    if data.source == "easy_vqa_captions":
        return EasyVqaCaptions(data.split)
    return EasyVqaSource(data.split, data.threads_per_sample)


def open_tokenizer(data: DataConfig, model: ModelConfig) -> Tokenizer:
    """The tokenizer that a data config names; `ConfigError` if the model has another `<voco>` id or too few rows."""
    try:
        tokenizer = Tokenizer.from_directory(data.tokenizer)
    except (OSError, ValueError) as error:
        raise ConfigError("data.tokenizer", f"must be usable: {error}") from error
    if tokenizer.voco_id != model.voco.token_id:
        raise ConfigError("model.voco.token_id", f"must be {tokenizer.voco_id}, the id of <voco> in {data.tokenizer}, "
                          f"got {model.voco.token_id}")
    if len(tokenizer) > model.decoder.num_tokens:
        raise ConfigError("model.decoder.vocab_size", f"must be at least {len(tokenizer)}, the size of "
                          f"{data.tokenizer} (without padding), got {model.decoder.num_tokens}")
    return tokenizer


class BatchStream:
    """An endless stream of batches (dicts of numpy arrays with a leading row axis) that can be saved and resumed.

    Args:
      model, data: configs of the stage.
      rows: rows per batch.
      seed: of the shuffling; every epoch has another order.
      visibilities: the model's, and its teacher's if it has one.
    """

    def __init__(self, model: ModelConfig, data: DataConfig, rows: int, seed: int, *visibilities: Visibility):
        self.tokenizer = open_tokenizer(data, model)
        self.tally = Tally(data.max_skipped_share)
        self.shape: RowShape = row_shape(data, model.vision.image_size, model.unit_tokens, *visibilities)
        prepared = PreparedSource(open_source(data), model, data, self.tokenizer, self.tally)
        if len(prepared) == 0:
            raise ConfigError("data", f"has no record in {data.path or data.source}")
        items = grain.MapDataset.source(prepared).shuffle(seed).repeat().to_iter_dataset(
            grain.ReadOptions(num_threads=data.num_threads, prefetch_buffer_size=4 * data.num_threads)
        )
        self._iterator = iter(PackedRows(items, self.shape, data.pack_window).batch(rows, drop_remainder=True))

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON-able values."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on behind the batch at which `get_state` was called."""
        self._iterator.set_state(state)
