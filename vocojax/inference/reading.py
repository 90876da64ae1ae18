"""A model and its prompts: conversations about units, laid out and run, whole or after a cache."""

import functools
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from vocojax.config import require
from vocojax.data.conversation import Conversation, Template
from vocojax.data.images import Fit
from vocojax.data.tokenizer import Tokenizer
from vocojax.inference.caches.cache import VocoCache, cached_shape, require_model
from vocojax.inference.caches.fingerprint import Fingerprint, fingerprint
from vocojax.inference.decoding.decode import Generation
from vocojax.inference.decoding.sampling import GREEDY, SamplingConfig, one_each
from vocojax.inference.decoding.text import FinishedText
from vocojax.inference.prompts import lay_out_prompt, prompt_text
from vocojax.inference.requests import conversations_of
from vocojax.inference.runner import Runner, not_about
from vocojax.layout import VISIBILITIES, SampleLayout, Visibility, lay_out_unit, unit_shape
from vocojax.models.voco import VocoLlama
from vocojax.pretrained.processor import Processor

MAX_LENGTH = 2048  # of prompts, in tokens, where nothing else is said


class Reader:
    """A model that reads laid-out prompts: units that are given whole, or that a cache holds, and then a text.

    Attributes:
      model: answers.
      processor: prepares its images and holds its tokenizer, template and unit shape.
      visibility: `voco`, or `causal` to evaluate a bound or a baseline.
      max_length: the longest prompt, in tokens; after a cache, an image counts the tokens that are cached of it. None
        for 2,048, to which cached tokens are added up to the decoder's `max_positions`.
      mesh: the devices that the model's parameters lie on; None for one device.
      runner: runs laid-out prompts.
    """

    def __init__(
        self,
        model: VocoLlama,
        tokenizer: Tokenizer,
        template: Template,
        visibility: Visibility = "voco",
        fit: Fit = "pad",
        max_length: int | None = None,
        mesh: Mesh | None = None,
    ):
        require(visibility in VISIBILITIES, "visibility", f"must be one of {list(VISIBILITIES)}", visibility)
        self.model, self.mesh = model, mesh
        self.processor = Processor(tokenizer, model.config.vision.image_size, unit_shape(model.config), template, fit)
        self.visibility: Visibility = visibility
        self.max_length = max_length
        self.runner = Runner(model, tokenizer, template.stop, visibility, mesh)

    @property
    def tokenizer(self) -> Tokenizer:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def template(self) -> Template:
        """The processor's template."""
        return self.processor.template

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the model, by which its caches are recognised; computed once."""
        with self.runner.devices():
            return fingerprint(self.model, self.tokenizer)

    def prompt(self, question: str | Conversation, num_units: int = 1) -> str:
        """Returns the exact prompt of a question as text, special tokens included.

        Args:
          question: a text, or a conversation.
          num_units: images, tiles or frames before it; the vision tokens of each are written as one placeholder.
        """
        (conversation,) = conversations_of([question])
        return prompt_text(self.lay_out(conversation, num_units), self.tokenizer)

    def generate_behind(
        self,
        cache: VocoCache,
        conversations: Sequence[Conversation],
        units: Sequence[Sequence[int]],
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> Generation:
        """Answers conversations after cached units (two stages); arguments as those of `Assistant.read`."""
        if not conversations or not all(units):
            raise not_about(cache, units)
        samples = [self.lay_out(c, len(own), cache) for c, own in zip(conversations, units, strict=True)]
        *_, last = self.runner.run_behind(cache, samples, units, one_each(sampling, seeds, len(samples)))
        return last

    def generate_whole(
        self,
        images: Sequence[Sequence[np.ndarray]],
        conversations: Sequence[Conversation],
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> Generation:
        """Answers conversations together with their prepared images (single pass).

        Args:
          images: of each conversation, one uint8 [size, size, 3] array per unit.
          conversations: whose last turn is the user's.
          sampling: see `Assistant.read`.
          seeds: see `Assistant.read`.
        """
        samples = [self.lay_out(c, len(own)) for c, own in zip(conversations, images, strict=True)]
        *_, last = self.runner.run_whole(samples, images, one_each(sampling, seeds, len(samples)))
        return last

    def texts(self, generation: Generation, sampling: SamplingConfig = GREEDY) -> list[str]:
        """Returns the answers as text."""
        return [self.finish(ids, sampling).text for ids in np.asarray(generation.ids_BT).tolist()]

    def finish(self, ids: Sequence[int], sampling: SamplingConfig) -> FinishedText:
        """Reads a complete answer: one row of a generation with these settings."""
        return self.runner.answer_text(sampling).finish(ids[: sampling.max_new_tokens])

    def lay_out(self, conversation: Conversation, num_units: int, cache: VocoCache | None = None) -> SampleLayout:
        """Lays out a prompt about units that are read whole, or that a cache holds.

        Raises:
          LayoutError: the prompt is no question or too long.
          CacheError: the cache is another model's, or not of the tokens that this model's text sees.
        """
        unit, hidden = self.processor.unit, 0
        if cache is not None:
            if cache.fingerprint is not None:
                require_model(cache, self.fingerprint, "the cache")
            unit, hidden = cached_shape(cache, lay_out_unit("unit", self.tokenizer, unit), self.visibility, num_units)
        record, longest = conversation[-1].text if conversation else "", self.max_length or MAX_LENGTH
        if self.max_length is None and cache is not None:
            more = longest + num_units * cache.tokens_per_unit
            longest = max(longest, min(more, self.model.config.decoder.max_positions))
        length = longest + hidden * num_units
        return lay_out_prompt(record, num_units, conversation, self.template, self.tokenizer, unit, length)

    def prompt_tokens(self, sample: SampleLayout, cache: VocoCache | None = None) -> int:
        """Returns how many tokens of a prompt are read: all, or its text and what the cache holds of its units."""
        read = sample.text_start if cache is None else sample.num_units * cache.tokens_per_unit
        return len(sample) - sample.text_start + read
