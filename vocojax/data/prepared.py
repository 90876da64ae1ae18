"""From a source's records to packable items: first laid out, and only when they have a row their images are read."""

from dataclasses import dataclass
from pathlib import Path

from vocojax.config import ModelConfig
from vocojax.data.config import DataConfig
from vocojax.data.conversation import Template, template
from vocojax.data.images import load_image
from vocojax.data.packing import Item, Size
from vocojax.data.sources import Source
from vocojax.data.tokenizer import Tokenizer
from vocojax.layout import LayoutError, SampleLayout, UnitShape, lay_out_sample, require_targets


@dataclass(frozen=True)
class Prepared:
    """A record laid out; its images are still on disk."""

    record: int
    layout: SampleLayout
    images: tuple[Path, ...]
    size: Size


class PreparedSource:
    """A source's records as packable items.

    `lay_out` is cheap in memory and `load` is what takes time; with `keep_in_memory` the results of both stay.
    """

    def __init__(self, source: Source, model: ModelConfig, data: DataConfig, tokenizer: Tokenizer):
        self._source, self._data, self._tokenizer = source, data, tokenizer
        self._image_size = model.vision.image_size
        self._unit = unit_shape(model)
        self._template: Template = template(data.template)
        self._laid_out: dict[int, Prepared] = {}
        self._loaded: dict[int, Item] = {}

    def __len__(self) -> int:
        return len(self._source)

    def lay_out(self, record: int) -> Prepared:
        """Reads a record and lays its text out.

        Raises:
          LayoutError: it can't be used.
        """
        if record in self._laid_out:
            return self._laid_out[record]
        sample = self._source[record]
        if len(sample.images) > self._data.images_per_row:
            raise LayoutError(sample.id, f"has {len(sample.images)} images, a row has room for "
                              f"{self._data.images_per_row}: raise data.images_per_row", "too many images")
        threads = [self._template.spans(thread, self._tokenizer.eos_token) for thread in sample.threads]
        layout = require_targets(
            lay_out_sample(sample.id, len(sample.images), threads, self._tokenizer, self._unit, self._data.row_length)
        )
        size = Size(len(layout), len(sample.images), layout.num_targets)
        if size.targets > self._data.target_slots:
            raise LayoutError(sample.id, f"has {size.targets} targets, a row has room for "
                              f"{self._data.target_slots}: raise data.max_targets", "too many targets")
        prepared = Prepared(record, layout, sample.images, size)
        if self._data.keep_in_memory:
            self._laid_out[record] = prepared
        return prepared

    def load(self, prepared: Prepared) -> Item:
        """Reads and decodes the record's images.

        Raises:
          ImageError: one of them can't be used.
        """
        if prepared.record in self._loaded:
            return self._loaded[prepared.record]
        images = tuple(load_image(path, self._image_size, self._data.fit) for path in prepared.images)
        item = Item(prepared.layout, images)
        if self._data.keep_in_memory:
            self._loaded[prepared.record] = item
        return item


def unit_shape(model: ModelConfig) -> UnitShape:
    """Tokens and VoCo tokens of the units that a model is trained on."""
    return UnitShape(model.unit_tokens, model.unit_vocos)
