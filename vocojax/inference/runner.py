"""Laid-out prompts in, answers' tokens out: after cached units, or together with their images."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from vocojax.data.tokenizer import Tokenizer
from vocojax.errors import InputError
from vocojax.inference.caches.cache import VocoCache, place
from vocojax.inference.decoding.decode import LOOK_EVERY, Generation, Prompts, stream
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.decoding.text import AnswerText
from vocojax.inference.prompts import batch_bucket, bucket, filled, text_prompts, whole_prompts
from vocojax.layout import SampleLayout, Visibility
from vocojax.models.llama import KeyValues
from vocojax.models.voco import VocoLlama


@dataclass(frozen=True, eq=False)
class Runner:
    """The part of an assistant that runs its model on prompts.

    Attributes:
      model: answers.
      tokenizer: the model's.
      stop: text that ends an answer in the prompt's template; '' for none.
      visibility: who sees whom.
      mesh: the devices that the model's parameters lie on; None for one device.
    """

    model: VocoLlama
    tokenizer: Tokenizer
    stop: str
    visibility: Visibility
    mesh: Mesh | None = None

    def answer_text(self, sampling: SamplingConfig) -> AnswerText:
        """Returns what turns an answer's tokens into its text."""
        return AnswerText(self.tokenizer, sampling.stop, self.stop)

    def devices(self) -> contextlib.AbstractContextManager[object]:
        """Returns a context in which the mesh is in force, and dtypes are the config's even with JAX_ENABLE_X64."""
        stack = contextlib.ExitStack()
        stack.enter_context(jax.enable_x64(False))
        if self.mesh is not None:
            stack.enter_context(jax.set_mesh(self.mesh))
        return stack

    def run_behind(
        self,
        cache: VocoCache,
        samples: Sequence[SampleLayout],
        units: Sequence[Sequence[int]],
        samplings: Sequence[SamplingConfig],
        every: int | None = None,
    ) -> Iterator[Generation]:
        """Answers laid-out prompts after cached units, each with its own settings.

        Args:
          cache: holds the units.
          samples: from `Assistant.lay_out` with this cache.
          units: for each prompt the units before it, in order; may be none.
          samplings: one per prompt.
          every: tokens between looks at the answers; None for as few as the settings allow.

        Yields:
          The answers so far; the last one is complete.
        """
        about = [unit for row in units for unit in row]
        if about and not 0 <= min(about) <= max(about) < cache.num_units:
            raise not_about(cache, units)
        with self.devices():
            rows = batch_bucket(len(samples))
            samples, units = filled(samples, rows), filled(units, rows)
            # Slots and lengths are rounded up too: few programs serve all sizes.
            slots = 1 << (max(1, *map(len, units)) - 1).bit_length()
            length = bucket(max(len(sample) - sample.text_start for sample in samples))
            prompts = text_prompts(samples, self.visibility, slots * cache.tokens_per_unit, length)
            units_BT = np.array([[*own, *[-1] * (slots - len(own))] for own in units])
            prefix = place(cache, units_BT, self.model.config)
        return self._answers(prompts, prefix, samplings, every)

    def run_whole(
        self,
        samples: Sequence[SampleLayout],
        images: Sequence[Sequence[np.ndarray]],
        samplings: Sequence[SamplingConfig],
    ) -> Iterator[Generation]:
        """Answers laid-out prompts together with their prepared images; see `run_behind`."""
        with self.devices():
            rows = batch_bucket(len(samples))
            samples, images = filled(samples, rows), filled(images, rows)
            length = bucket(max(map(len, samples)))
            prompts = whole_prompts(samples, images, self.model.config, self.visibility, length)
        return self._answers(prompts, None, samplings)

    def _answers(
        self,
        prompts: Prompts,
        prefix: KeyValues | None,
        samplings: Sequence[SamplingConfig],
        every: int | None = None,
    ) -> Iterator[Generation]:
        count = len(samplings)
        samplings = filled(samplings, len(prompts.lengths_B))
        texts = [self.answer_text(sampling) for sampling in samplings]
        longest = max(sampling.max_new_tokens for sampling in samplings)
        every = every or (LOOK_EVERY if any(text.has_stops for text in texts) else longest)
        answers = stream(self.model, prompts, prefix, self.tokenizer.eos_id, samplings, every,
                         lambda row, ids: texts[row].is_over(ids))
        while True:
            with self.devices():  # not around the yield: the caller may have a mesh of its own in force
                generation = next(answers, None)
            if generation is None:
                return
            yield Generation(generation.ids_BT[:count], generation.logits_BV[:count])


def not_about(cache: VocoCache, units: Sequence[Sequence[int]]) -> InputError:
    """Returns the error of questions about no units, or about units that a cache does not hold."""
    return InputError(f"questions must be about units 0 to {cache.num_units - 1}, at least one each, got "
                      f"{[list(own) for own in units]}")
