"""From a source's records to items for packing. Records are laid out first; images are read when a row is planned."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vocojax.config import ConfigError, ModelConfig
from vocojax.data.config import DataConfig
from vocojax.data.conversation import Template, template
from vocojax.data.images import ImageError, count_units, decode_units, pixel_size, prepare_frame, read
from vocojax.data.packing import Item, RowShape, Size
from vocojax.data.sources.base import Source
from vocojax.data.text_rows import TextRowShape
from vocojax.data.tokenizer import Tokenizer
from vocojax.data.videos import FramePlan, plan_frames, read_plan
from vocojax.layout import LayoutError, SampleLayout, lay_out_sample, require_targets, unit_shape

VOCOS = 1  # stream of the random numbers for `drawn_vocos`: others than those for frames


@dataclass(frozen=True)
class Prepared:
    """A record that is laid out, but whose images and frames are not decoded.

    Attributes:
      record: its number in the source.
      layout: its tokens and who sees whom.
      images: files or their content, as in `Sample`.
      videos: the chosen frames of each video.
      size: the room that it needs in a row.
    """

    record: int
    layout: SampleLayout
    images: tuple[Path | bytes, ...]
    videos: tuple[FramePlan, ...]
    size: Size


class PreparedSource:
    """A source's records as items for packing.

    `lay_out` needs little memory, `load` most of the time. With `data.keep_in_memory` the results of both are kept.

    Args:
      source: the records.
      model: model config, for the size and tokens of a unit.
      data: data config of the stage.
      tokenizer: the model's tokenizer.
      shape: of a row.
      seed: of the draws of `data.frame_jitter` and `data.fewest_vocos`.

    Attributes:
      reads_videos: whether a record with videos was laid out. That reads their files, which takes time.

    Raises:
      ConfigError: `data.fewest_vocos` is more than the model has.
    """

    def __init__(self, source: Source, model: ModelConfig, data: DataConfig, tokenizer: Tokenizer,
                 shape: RowShape | TextRowShape, seed: int = 0):
        self._source, self._data, self._tokenizer, self._seed = source, data, tokenizer, seed
        self._shape = shape
        self._image_size = model.vision.image_size
        self._unit = unit_shape(model)
        self._template: Template = template(data.template)
        if data.fewest_vocos is not None and data.fewest_vocos > model.unit_vocos:
            raise ConfigError("data.fewest_vocos", f"must be at most {model.unit_vocos}, the model's VoCo tokens, got "
                              f"{data.fewest_vocos}")
        self._levels = model.voco.levels
        self._laid_out: dict[int, Prepared] = {}
        self._loaded: dict[int, tuple[np.ndarray, ...]] = {}
        self.reads_videos = False

    def __len__(self) -> int:
        return len(self._source)

    def record_id(self, record: int) -> str:
        """Returns the name that a record has in its file; '' if the record can't be read."""
        try:
            return self._source[record].id
        except LayoutError:
            return ""

    def unknown_words(self, record: int) -> list[tuple[str, bool]]:
        """Returns the words of a record that its tokenizer does not know, each with whether it is a target.

        Raises:
          LayoutError: the record can't be used.
        """
        if not self._tokenizer.has_unknown_words:
            return []
        sample = self._source[record]
        spans = [span for thread in sample.threads for span in self._template.spans(
            thread, self._tokenizer.eos_token, bool(sample.images or sample.videos))]
        return [(word, span.is_target) for span in spans for word in self._tokenizer.unknown_words(span.text)]

    def lay_out(self, record: int, position: int = 0) -> Prepared:
        """Reads a record, chooses the frames of its videos and lays its text out.

        Args:
          record: its number in the source.
          position: where the record stands in the shuffled order: other frames, and another number of VoCo tokens that
            are read, are drawn in every epoch.

        Raises:
          LayoutError: the record can't be used.
          ImageError: the units of its images or videos can't be counted.
        """
        prepared = self._lay_out(record, position)
        if self._data.fewest_vocos is None:
            return prepared
        read = drawn_vocos(self._levels, self._data.fewest_vocos, position, self._data.anneal_samples, self._seed)
        unread = prepared.layout.unit.vocos - read
        return dataclasses.replace(prepared, layout=dataclasses.replace(prepared.layout, unread=unread))

    def _lay_out(self, record: int, position: int) -> Prepared:
        if record in self._laid_out:
            return self._laid_out[record]
        sample = self._source[record]
        data = self._data
        self.reads_videos |= bool(sample.videos)
        jitter = np.random.default_rng([self._seed, position]) if data.frame_jitter else None
        videos = tuple(plan_frames(video, data.frame_sampling, data.frames, data.video_seconds, jitter)
                       for video in sample.videos)
        units = self._count_units(sample.images, sample.id) + sum(map(len, videos))
        if units > self._data.images_per_row:
            raise LayoutError(sample.id, f"has {units} images, frames or tiles, a row has room for "
                              f"{self._data.images_per_row}: raise data.images_per_row", "too many images")
        threads = [self._template.spans(thread, self._tokenizer.eos_token, units > 0) for thread in sample.threads]
        question = self._template.question(sample.threads[0], units > 0) if sample.threads else ""
        layout = require_targets(lay_out_sample(
            sample.id, units, threads, self._tokenizer, self._unit, self._shape.most_tokens(units), question))
        size = self._shape.size(layout)
        if size.targets > self._data.target_slots:
            raise LayoutError(sample.id, f"has {size.targets} targets, a row has room for "
                              f"{self._data.target_slots}: raise data.max_targets", "too many targets")
        prepared = Prepared(record, layout, sample.images, videos, size)
        if self._data.keep_in_memory:
            self._laid_out[record] = prepared
        return prepared

    def load(self, prepared: Prepared) -> Item:
        """Reads and decodes the record's images and videos.

        Raises:
          ImageError: one of them can't be used.
        """
        if prepared.record in self._loaded:
            return Item(prepared.layout, self._loaded[prepared.record])
        data, size, name = self._data, self._image_size, prepared.layout.record
        units: list[np.ndarray] = []
        for image in prepared.images:
            units += decode_units(*_content(image, name), size, data.fit)
        for plan in prepared.videos:
            for frame in read_plan(plan, data.video_seconds):
                units.append(prepare_frame(frame, size, data.fit))
        if len(units) != prepared.layout.num_units:
            raise ImageError(name, f"has {len(units)} units, it was laid out with {prepared.layout.num_units}",
                             "changed file")
        if self._data.keep_in_memory:
            self._loaded[prepared.record] = tuple(units)
        return Item(prepared.layout, tuple(units))

    def _count_units(self, images: Sequence[Path | bytes], record: str) -> int:
        """Counts the units of a sample's images, reading no more of their files than that takes."""
        if self._data.fit != "anyres":
            return len(images)
        return sum(count_units(*pixel_size(*_content(image, record)), self._image_size, "anyres") for image in images)


def drawn_vocos(levels: Sequence[int], fewest: int, position: int, anneal_samples: int, seed: int) -> int:
    """Draws how many VoCo tokens of its units a sample's text reads.

    Args:
      levels: the numbers that there are, ascending (`VocoConfig.levels`).
      fewest: the least that may be drawn; with `anneal_samples` it goes down to this from all, by equal factors.
      position: the sample's place in the shuffled order; the draw depends on nothing else.
      anneal_samples: samples over which it goes down; 0 for none.
      seed: of the draws.
    """
    done = min(position / anneal_samples, 1.0) if anneal_samples else 1.0
    least = levels[-1] * (fewest / levels[-1]) ** done
    allowed = [level for level in levels if level >= least - 1e-9]
    return int(np.random.default_rng([seed, position, VOCOS]).choice(allowed))


def _content(image: Path | bytes, record: str) -> tuple[bytes, str]:
    """Returns an image's encoded content and its name for errors."""
    return (image, record) if isinstance(image, bytes) else (read(image), str(image))
