"""Images and conversations in, what a model takes out: tokenizer, image preparation and prompt layout together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vocojax.data.conversation import Conversation, Template, Turn, template
from vocojax.data.images import Fit, load_image, prepare
from vocojax.data.packing import Item
from vocojax.data.tokenizer import Tokenizer
from vocojax.layout import UnitShape, lay_out_sample
from vocojax.pretrained.source import open_source
from vocojax.runs.card import ModelCard


@dataclass(frozen=True)
class Processor:
    """Prepares samples for a model.

        processor = Processor.from_pretrained("voco-llama-7b")
        item = processor(["photo.png"], "What is in the picture?")   # laid out, ready for `packing.pack_row`

    Attributes:
      tokenizer: with `<voco>`.
      image_size: edge of the square images that the vision tower takes, in pixels.
      unit: tokens and VoCo tokens that stand for one image.
      template: how a conversation is written out.
      fit: how images become square.
    """

    tokenizer: Tokenizer
    image_size: int
    unit: UnitShape
    template: Template
    fit: Fit = "pad"

    @classmethod
    def from_pretrained(cls, directory: str | Path, **parts: Any) -> "Processor":
        """Returns the processor of the weights in a directory.

        Args:
          directory: as `open_source` takes it.
          parts: the other arguments of `open_source`.

        Raises:
          ConvertError: no weights or no tokenizer there; names the file and the remedy.
        """
        return cls.from_card(open_source(directory, **parts).card)

    @classmethod
    def from_card(cls, card: ModelCard) -> "Processor":
        """Returns the processor of a model with this card."""
        return cls(card.tokenizer, card.model.vision.image_size, card.unit, template(card.template), card.fit)

    def load_images(self, images: Sequence[str | Path | Image.Image]) -> list[np.ndarray]:
        """Image files or RGB images -> uint8 [image_size, image_size, 3] each.

        Raises:
          ImageError: a file that can't be used.
        """
        return [prepare(image.convert("RGB"), self.image_size, self.fit) if isinstance(image, Image.Image)
                else load_image(image, self.image_size, self.fit) for image in images]

    def __call__(
        self, images: Sequence[str | Path | Image.Image], conversation: str | Conversation, max_length: int = 2048
    ) -> Item:
        """Lays out one sample.

        Args:
          images: of the sample, a unit each.
          conversation: a question, or turns; the answers in it are targets.
          max_length: text beyond so many tokens is dropped.

        Raises:
          ImageError, LayoutError: an image or a text that can't be used.
        """
        turns = (Turn("user", conversation),) if isinstance(conversation, str) else conversation
        spans = self.template.spans(turns, self.tokenizer.eos_token)
        layout = lay_out_sample(turns[-1].text if turns else "", len(images), [spans], self.tokenizer, self.unit,
                                max_length)
        return Item(layout, tuple(self.load_images(images)))
