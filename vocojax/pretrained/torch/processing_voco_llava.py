"""Images and prompts as rows of token ids and pixels, laid out as the model was trained with them.

    [BOS] [<image> x n] [newline] [<voco> x N] for each unit, and then [newline] and the text
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .cache_voco_llava import VocoCache
from .environment_voco_llava import PAST  # noqa: F401  # the import checks the version of transformers
from .fingerprint_voco_llava import Fingerprint  # noqa: F401  # older versions copy only what is imported here
from .image_processing_voco_llava import ImageSource, open_image, prepare_units

IMAGE_TOKEN = "<image>"
VOCO_TOKEN = "<voco>"


class VocoLlavaProcessor(ProcessorMixin):
    """A function from images and prompts to a model's inputs.

        inputs = processor(images="photo.png", text="<image>USER: what color is it? ASSISTANT:")
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)

    Args:
      tokenizer: the model's tokenizer.
      image_size: side of a unit's image, in pixels.
      image_seq_length: number of vision tokens of a unit.
      num_vocos: number of VoCo tokens of a unit.
      fit: how images become square, see `prepare_units`.
      chat_template: Jinja template that writes out conversations.
    """

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int = 336,
        image_seq_length: int = 576,
        num_vocos: int = 1,
        fit: str = "pad",
        chat_template: str | None = None,
    ):
        self.image_size = image_size
        self.image_seq_length = image_seq_length
        self.num_vocos = num_vocos
        self.fit = fit
        super().__init__(tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", "pixel_values", "voco_units"]

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        voco_cache: VocoCache | None = None,
        voco_units: Sequence[Sequence[int]] | None = None,
        num_vocos: int | None = None,
        return_tensors: str | None = "pt",
        padding_side: str = "left",
        **ignored: Any,
    ) -> BatchFeature:
        """Lays out prompts, padded to one length.

        Args:
          images: files, web addresses, PIL images or arrays: one, or a list, or a list for each prompt.
          text: one or several prompts as `apply_chat_template` writes them. `<image>` stands for an image, wherever it
            is in the prompt: images come first. It may be left out where it is clear to which prompt an image belongs.
            None to prepare images alone, to be compressed.
          voco_cache: VoCo tokens that are read in place of images.
          voco_units: for each prompt the units of the cache that it is about, in order; None for all of them.
          num_vocos: VoCo tokens of a unit; None for as many as the model was trained with. Fewer are its first ones.
          return_tensors: `pt`, or None for lists of lists.
          padding_side: `left` to generate, `right` to train.
          ignored: settings of other processors that have no meaning here: only `padding`, `add_special_tokens` and
            `return_dict`.

        Returns:
          `input_ids` and `attention_mask` [B, S]; `pixel_values`, uint8 [B, U, 3, size, size], if there are images;
          `voco_units` [B, T] with a cache.

        Raises:
          ValueError: images and prompts do not fit each other, or a prompt contains `<voco>`.
        """
        if unknown := ignored.keys() - {"padding", "add_special_tokens", "return_dict"}:
            raise TypeError(f"the processor has no argument {', '.join(sorted(unknown))}")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        if text is None:
            if images is None:
                raise ValueError("pass images, text or both")
            units = [unit for image in _listed(images) for unit in self._units(image)]
            return BatchFeature({"pixel_values": torch.from_numpy(_stacked([units]))})
        prompts = [text] if isinstance(text, str) else list(text)
        if voco_cache is not None:
            if images is not None or num_vocos is not None:
                raise ValueError("with a voco_cache, leave out images and num_vocos: use voco_cache.truncate")
            return self._after_cache(prompts, voco_cache, voco_units, return_tensors, padding_side)
        rows_of_images = [[unit for image in own for unit in self._units(image)]
                          for own in deal_images(images, prompts)]
        vocos = self.num_vocos if num_vocos is None else num_vocos
        if not 1 <= vocos <= self.num_vocos:
            raise ValueError(f"num_vocos must be in [1, {self.num_vocos}], got {vocos}")
        rows = [self._row(prompt, len(units), vocos) for prompt, units in zip(prompts, rows_of_images, strict=True)]
        ids, mask = self._padded(rows, padding_side)
        data = _in_form({"input_ids": ids, "attention_mask": mask}, return_tensors)
        if any(rows_of_images):
            data["pixel_values"] = torch.from_numpy(_stacked(rows_of_images))
        return BatchFeature(data)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = True,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Writes out conversations with the template that the model was trained with.

        Args:
          conversation: messages, or a list of conversations. A message is `{"role": ..., "content": ...}`; its content
            is a text, or a list of `{"type": "text", "text": ...}` and `{"type": "image", "url": ...}` (or `path`, or
            `image`). Without the image itself it is a place for one of `images`.
          chat_template: a Jinja template in place of the model's.
          tokenize: whether to return the model's inputs in place of the prompts.
          return_dict: whether the inputs are everything, or the token ids alone.
          processor_kwargs: arguments of `__call__`.
          kwargs: arguments of `__call__`, and of transformers' `apply_chat_template`.
        """
        names = ("images", "voco_cache", "voco_units", "num_vocos", "return_tensors", "padding_side", "padding")
        call = {**(processor_kwargs or {}), **{name: kwargs.pop(name) for name in names if name in kwargs}}
        is_batch = not isinstance(conversation[0], Mapping)
        conversations = conversation if is_batch else [conversation]
        prompts = [super(VocoLlavaProcessor, self).apply_chat_template(
            [{"role": message["role"], "content": _without_data(message["content"])} for message in messages],
            chat_template=chat_template, tokenize=False, **kwargs) for messages in conversations]
        if not tokenize:
            return prompts if is_batch else prompts[0]
        own_images = [[image for message in messages for image in _images_of(message["content"])]
                      for messages in conversations]
        if any(own_images) and call.get("voco_cache") is None:
            call["images"] = own_images
        inputs = self(text=prompts, **call)
        return inputs if return_dict else inputs["input_ids"]

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Returns the text of token ids; arguments are those of the tokenizer's `decode`."""
        return str(self.tokenizer.decode(*args, **kwargs))

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Returns the texts of rows of token ids; arguments are those of the tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def _units(self, image: ImageSource) -> list[np.ndarray]:
        return prepare_units(open_image(image), self.image_size, self.fit)

    def _encode(self, text: str) -> list[tuple[int, int]]:
        """Returns the ids of a text, and for each the index of the character after its last one."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(token, end) for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]

    def _row(self, prompt: str, units: int, vocos: int) -> list[int]:
        """Returns the ids of units and the prompt's text."""
        bos, image_id, voco_id = self._special_ids()
        if not units:
            return [bos, *self._text(prompt, has_units=False)]
        lead = [token for token, end in self._encode(f"\n{VOCO_TOKEN}\n") if end <= 1]
        unit = [bos] + [image_id] * self.image_seq_length + lead + [voco_id] * vocos
        return unit * units + self._text(prompt, has_units=True)

    def _text(self, prompt: str, has_units: bool) -> list[int]:
        """Returns the ids of a prompt's text; after units it begins with a newline.

        Newline, `<voco>`, newline and text are encoded as one text: tokenizers that mark the beginning of a text then
        give the ids that the model was trained with.
        """
        prompt = re.sub(f"{IMAGE_TOKEN}\n?", "", prompt)
        if VOCO_TOKEN in prompt:
            raise ValueError(f"the prompt {prompt!r} contains the reserved token {VOCO_TOKEN!r}; remove it")
        if not has_units:
            return [token for token, _ in self._encode(prompt)]
        voco_id = self._special_ids()[2]
        return [token for token, end in self._encode(f"\n{VOCO_TOKEN}\n{prompt}") if end > 1 and token != voco_id]

    def _after_cache(
        self, prompts: Sequence[str], cache: VocoCache, units: Sequence[Sequence[int]] | None,
        return_tensors: str | None, padding_side: str,
    ) -> BatchFeature:
        """Lays out texts after VoCo tokens of a cache: each row begins with one `<voco>` for each of them."""
        about = [list(range(cache.num_units))] * len(prompts) if units is None else [list(own) for own in units]
        if len(about) != len(prompts) or any(not 0 <= unit < cache.num_units for own in about for unit in own):
            raise ValueError(f"voco_units must be a list of units of the {cache} for each of the {len(prompts)} "
                             f"prompts, got {units}")
        _, _, voco_id = self._special_ids()
        slots = max(map(len, about))
        ids, mask = self._padded(
            [self._text(prompt, bool(own)) if own else self._row(prompt, 0, 0)
             for prompt, own in zip(prompts, about, strict=True)], padding_side)
        filled = [[-1] * (slots - len(own)) + own for own in about]
        shown = [[int(unit >= 0) for unit in own for _ in range(cache.num_vocos)] for own in filled]
        pad = self._pad_id()
        data = {
            "input_ids": [[voco_id if seen else pad for seen in prefix] + row
                          for prefix, row in zip(shown, ids, strict=True)],
            "attention_mask": [prefix + row for prefix, row in zip(shown, mask, strict=True)],
            "voco_units": filled,
        }
        return BatchFeature(_in_form(data, return_tensors))

    def _padded(self, rows: Sequence[list[int]], side: str) -> tuple[list[list[int]], list[list[int]]]:
        """Returns rows padded to one length, and their masks: 1 for tokens, 0 for padding."""
        length, pad, ids, mask = max(map(len, rows)), self._pad_id(), [], []
        for row in rows:
            fill = length - len(row)
            ids.append([pad] * fill + row if side == "left" else row + [pad] * fill)
            mask.append([0] * fill + [1] * len(row) if side == "left" else [1] * len(row) + [0] * fill)
        return ids, mask

    def _special_ids(self) -> tuple[int, int, int]:
        """Returns the ids of BOS, `<image>` and `<voco>`."""
        bos, image_id, voco_id = self.tokenizer.convert_tokens_to_ids(
            [self.tokenizer.bos_token, IMAGE_TOKEN, VOCO_TOKEN])  # type: ignore[misc, list-item]
        return bos, image_id, voco_id

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


def deal_images(images: Any, prompts: Sequence[str]) -> list[list[ImageSource]]:
    """Returns the images of each prompt.

    Raises:
      ValueError: it is not clear which prompt an image belongs to, or their numbers differ from those of the markers.
    """
    markers = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
    flat = [] if images is None else _listed(images)
    if flat and all(isinstance(own, list | tuple) for own in flat):
        rows = [list(own) for own in flat]
    elif not any(markers) and len(prompts) == 1:
        rows = [flat]
    elif not any(markers) and len(prompts) == len(flat):
        rows = [[image] for image in flat]
    elif sum(markers) == len(flat):
        ends = np.cumsum(markers)
        rows = [flat[end - count : end] for end, count in zip(ends, markers, strict=True)]
    else:
        raise ValueError(f"there are {len(flat)} images, and {markers} markers {IMAGE_TOKEN} in the prompts: write one "
                         "for each image, or pass a list of images for each prompt")
    if len(rows) != len(prompts) or any(count not in (0, len(own)) for count, own in zip(markers, rows, strict=True)):
        raise ValueError(f"the prompts have {markers} markers {IMAGE_TOKEN}, but {[len(own) for own in rows]} images: "
                         "write one for each image, or none")
    return rows


def _listed(images: Any) -> list[Any]:
    return list(images) if isinstance(images, list | tuple) else [images]


def _stacked(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Returns uint8 [B, U, 3, H, W] of rows of units [H, W, 3]; unused slots are black."""
    slots = max(map(len, rows))
    size = next(len(unit) for row in rows for unit in row)
    pixels = np.zeros((len(rows), slots, 3, size, size), np.uint8)
    for index, row in enumerate(rows):
        for slot, unit in enumerate(row):
            pixels[index, slot] = unit.transpose(2, 0, 1)
    return pixels


def _in_form(data: Mapping[str, Any], return_tensors: str | None) -> dict[str, Any]:
    if return_tensors not in ("pt", None):
        raise ValueError(f"return_tensors must be 'pt' or None, got {return_tensors!r}")
    return {key: torch.tensor(value) if return_tensors else value for key, value in data.items()}


def _without_data(content: Any) -> Any:
    """Returns a message's content with its images as places for them."""
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] == "image" else dict(part) for part in content]


def _images_of(content: Any) -> list[ImageSource]:
    """Returns the images in a message's content."""
    if isinstance(content, str):
        return []
    sources = [next((part[key] for key in ("image", "url", "path", "base64") if part.get(key) is not None), None)
               for part in content if part["type"] == "image"]
    return [source for source in sources if source is not None]
