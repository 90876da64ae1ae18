"""The processor: tokenizer, image preparation and prompt layout of a model together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vocojax.data.conversation import Conversation, Template, Turn, template
from vocojax.data.images import Fit, load_image, prepare, to_rgb
from vocojax.data.packing import Item
from vocojax.data.tokenizer import Tokenizer
from vocojax.layout import UnitShape, lay_out_sample
from vocojax.pretrained.source import open_source
from vocojax.runs.card import ModelCard

ImageSource = str | Path | bytes | Image.Image  # a file, its content, or an image


@dataclass(frozen=True)
class Processor:
    """A function from images and conversations to samples of a model.

        processor = Processor.from_pretrained("voco-llama-7b")
        item = processor(["photo.png"], "What is in the picture?")   # laid out, ready for `packing.pack_row`

    Attributes:
      tokenizer: a tokenizer that knows `<voco>`.
      image_size: edge of the vision tower's square images, in pixels.
      unit: numbers of vision tokens and VoCo tokens of one image.
      template: writes a conversation as text.
      fit: how images become square.
    """

    tokenizer: Tokenizer
    image_size: int
    unit: UnitShape
    template: Template
    fit: Fit = "pad"

    @classmethod
    def from_pretrained(cls, directory: str | Path, **parts: Any) -> "Processor":
        """Returns the processor of the model in a directory.

        Args:
          directory: see `open_source`.
          **parts: the other arguments of `open_source`.

        Raises:
          ConvertError: see `open_source`.
          CheckpointError: see `open_source`.
        """
        return cls.from_card(open_source(directory, **parts).card)

    @classmethod
    def from_card(cls, card: ModelCard) -> "Processor":
        """Returns the processor of a model with this card."""
        return cls(card.tokenizer, card.model.vision.image_size, card.unit, template(card.template), card.fit)

    def load_images(self, images: ImageSource | Sequence[ImageSource]) -> list[np.ndarray]:
        """Loads images and makes them square.

        Args:
          images: one or several files, contents of files, or PIL images.

        Returns:
          uint8 [image_size, image_size, 3], RGB, of each image.

        Raises:
          ImageError: a file can't be used.
        """
        several = [images] if isinstance(images, ImageSource) else images
        return [prepare(to_rgb(image), self.image_size, self.fit) if isinstance(image, Image.Image)
                else load_image(image, self.image_size, self.fit) for image in several]

    def __call__(
        self, images: ImageSource | Sequence[ImageSource], conversation: str | Conversation, max_length: int = 2048
    ) -> Item:
        """Lays out one sample.

        Args:
          images: the sample's image, or its images; each becomes a unit.
          conversation: a question, or turns whose answers are targets.
          max_length: the sample's maximum of tokens; further text is dropped.

        Returns:
          The sample: its layout and its images.

        Raises:
          ImageError: an image can't be used.
          LayoutError: the text can't be used, or the units are too long.
        """
        turns = (Turn("user", conversation),) if isinstance(conversation, str) else conversation
        units = tuple(self.load_images(images))
        spans = self.template.spans(turns, self.tokenizer.eos_token, bool(units))
        layout = lay_out_sample(turns[-1].text if turns else "", len(units), [spans], self.tokenizer, self.unit,
                                max_length, self.template.question(turns, bool(units)))
        return Item(layout, units)
