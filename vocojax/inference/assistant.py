"""Images and questions in, answers out: a trained model with its tokenizer and template."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from vocojax.config import require
from vocojax.data.conversation import Conversation, Template, Turn
from vocojax.data.conversation import template as find_template
from vocojax.data.images import Fit
from vocojax.data.tokenizer import Tokenizer
from vocojax.errors import InputError
from vocojax.inference.caches.cache import VocoCache, cached_shape, place, require_model
from vocojax.inference.caches.files import DamagedCache
from vocojax.inference.caches.fingerprint import Fingerprint, fingerprint
from vocojax.inference.caches.store import MissingCache, Store
from vocojax.inference.compress import BATCH, compress
from vocojax.inference.decoding.decode import LOOK_EVERY, Generation, Prompts, stream
from vocojax.inference.decoding.sampling import GREEDY, SamplingConfig, one_each
from vocojax.inference.decoding.text import AnswerText, FinishedText
from vocojax.inference.prompts import batch_bucket, bucket, filled, lay_out_prompt, text_prompts, whole_prompts
from vocojax.inference.visuals import Visual, VisualSource, listed, prepare_visual
from vocojax.layout import VISIBILITIES, SampleLayout, Visibility, lay_out_unit, unit_shape, units_stand_alone
from vocojax.models.llama import KeyValues
from vocojax.models.voco import VocoLlama
from vocojax.pretrained.loading import model_of
from vocojax.pretrained.processor import Processor
from vocojax.pretrained.source import open_source


class Assistant:
    """A model that answers questions about images.

        assistant = Assistant.from_run("runs/quickstart/seed_0/voco_1")
        cache = assistant.compress("photo.png")            # once
        assistant.read(cache, "what color is the shape?")  # as often as you like

    `inference.many.answer_many` answers many requests, each with its own images and settings.

    Attributes:
      model: answers.
      processor: prepares its images and holds its tokenizer, template and unit shape.
      visibility: `voco`, or `causal` to evaluate a bound or a baseline.
      max_length: the longest prompt, in tokens; after a cache, an image counts the tokens that are cached of it.
      mesh: the devices that the model's parameters lie on; None for one device.
    """

    def __init__(
        self,
        model: VocoLlama,
        tokenizer: Tokenizer,
        template: Template,
        visibility: Visibility = "voco",
        fit: Fit = "pad",
        max_length: int = 2048,
        mesh: Mesh | None = None,
    ):
        require(visibility in VISIBILITIES, "visibility", f"must be one of {list(VISIBILITIES)}", visibility)
        self.model, self.mesh = model, mesh
        self.processor = Processor(tokenizer, model.config.vision.image_size, unit_shape(model.config), template, fit)
        self.visibility: Visibility = visibility
        self.max_length = max_length

    @classmethod
    def from_run(
        cls, workdir: str | Path, visibility: Visibility | None = None, dtype: DTypeLike = jnp.float32
    ) -> "Assistant":
        """Loads a run of `training.stage.train` in float32; as `from_pretrained` otherwise."""
        return cls.from_pretrained(workdir, visibility=visibility, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        num_vocos: int | None = None,
        template: str | None = None,
        base: str | Path | None = None,
        visibility: Visibility | None = None,
        mesh: Mesh | None = None,
        dtype: DTypeLike | None = None,
    ) -> "Assistant":
        """Loads weights in any layout that `load_model` knows, runs included.

        Args:
          directory: of the weights.
          num_vocos, template: if the directory does not say them; None for the defaults of `open_source`.
          base: directory of a LoRA adapter's base model, if it is not where the adapter says.
          visibility: who sees whom; None for what the model was trained with.
          mesh: where the parameters go (`parallel.mesh.local_mesh`); None for the first device.
          dtype: of parameters and computation; None keeps the decoder's on disk.

        Raises:
          ConvertError, CheckpointError: name the file and the remedy.
        """
        source = open_source(directory, num_vocos=num_vocos, base=base)
        card = source.card
        written = find_template(template or card.template)
        model = model_of(source, directory, mesh=mesh, dtype=dtype)
        return cls(model, card.tokenizer, written, visibility or card.visibility, card.fit, mesh=mesh)

    def with_model(self, model: VocoLlama) -> "Assistant":
        """Returns an assistant that answers with another model, and is the same otherwise."""
        return Assistant(model, self.tokenizer, self.template, self.visibility, self.processor.fit, self.max_length,
                         self.mesh)

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
        with self._devices():
            return fingerprint(self.model, self.tokenizer)

    @property
    def reads_caches(self) -> bool:
        """True if the model answers from VoCo caches; bounds and baselines read whole images."""
        return units_stand_alone(self.visibility) and self.processor.unit.vocos > 0

    def load_images(self, paths: Sequence[str | Path]) -> list[np.ndarray]:
        """Prepares image files as one unit each; `ImageError` names the first that can't be used."""
        return self.processor.load_images(paths)

    def visual(self, source: VisualSource) -> Visual:
        """Prepares one visual; `ImageError` says what is wrong with it."""
        return prepare_visual(source, self.processor.image_size, self.processor.fit)

    def compress(self, images: VisualSource | Sequence[VisualSource], batch_size: int = BATCH) -> VocoCache:
        """Compresses visuals.

        Args:
          images: one or several files, images, videos or prepared units.
          batch_size: units that run at once, at most.

        Returns:
          The cache of all their units, in their order.

        Raises:
          ImageError: one of them can't be used.
          InputError: there are none, or the model has no VoCo tokens.
        """
        units = [unit for source in listed(images) for unit in self.visual(source).units]
        with self._devices():
            return compress(self.model, self.tokenizer, units, self.fingerprint, batch_size)

    def recall(
        self, store: Store, images: VisualSource | Sequence[VisualSource], num_vocos: int | None = None
    ) -> VocoCache:
        """Reads the caches of visuals from a store; those that are missing or damaged are compressed and put in.

        Args:
          store: where they are sought.
          images: one or several files, images, videos or prepared units.
          num_vocos: how many VoCo tokens of each unit are read; None for all that the model makes.

        Returns:
          The cache of all their units, in their order.
        """
        cache = VocoCache.concat(self.caches_of([self.visual(source) for source in listed(images)], store))
        return cache if num_vocos is None else cache.truncate(num_vocos)

    def caches_of(self, visuals: Sequence[Visual], store: Store | None = None) -> list[VocoCache]:
        """Returns the cache of each visual, from the store where it is there, else compressed and put in."""
        if not isinstance(store, Store | None):
            raise InputError(f"store must be a Store, got {type(store).__name__}: Store('caches') is one")
        different = {visual.digest: visual for visual in visuals}
        caches: dict[str, VocoCache] = {}
        if store is not None:
            for digest in different:
                with contextlib.suppress(MissingCache, DamagedCache):
                    caches[digest] = store.get(digest, self.fingerprint, self.processor.unit.vocos)
        missing = {digest: visual for digest, visual in different.items() if digest not in caches}
        if missing:
            new = self.compress(list(missing.values())).split([len(visual.units) for visual in missing.values()])
            caches |= dict(zip(missing, new, strict=True))
            if store is not None:
                for cache in new:
                    store.put_visual(cache)
        return [caches[visual.digest] for visual in visuals]

    def read(
        self,
        cache: VocoCache,
        questions: str | Sequence[str],
        units: Sequence[Sequence[int]] | None = None,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Answers questions about cached images.

        Args:
          cache: of the images.
          questions: one text, or several.
          units: for each question the units it is about, in order; by default all of them.
          sampling: how the answers' tokens are chosen.
          seeds: for each question the seed of its draws; by default `sampling.seed` plus its index.

        Returns:
          One answer per question.

        Raises:
          CacheError: the cache is another model's, or not of the tokens that this model's text sees.
          InputError: a question is about no unit, or about one that is not in the cache.
          LayoutError: a question is too long.
        """
        units, asked = self._about(cache, questions, units)
        return self.texts(self.generate_behind(cache, asked, units, sampling, seeds), sampling)

    def stream(
        self,
        cache: VocoCache,
        questions: str | Sequence[str],
        units: Sequence[Sequence[int]] | None = None,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
        every: int = 1,
    ) -> Iterator[list[str]]:
        """Answers like `read`, showing the answers while they are written.

        Args:
          cache, questions, units, sampling, seeds: see `read`.
          every: tokens between two looks at the answers.

        Yields:
          The new text of each answer, '' for nothing; the pieces of an answer put together are `read`'s.
        """
        units, asked = self._about(cache, questions, units)
        samplings = one_each(sampling, seeds, len(asked))
        text, shown = self._answer_text(sampling), [""] * len(asked)
        samples = [self.lay_out(conversation, len(own), cache) for conversation, own in zip(asked, units, strict=True)]
        for generation in self.run_behind(cache, samples, units, samplings, every):
            now = [text.sure(ids) for ids in generation.ids_BT.tolist()]
            yield [new[len(old) :] for new, old in zip(now, shown, strict=True)]
            shown = [max(new, old, key=len) for new, old in zip(now, shown, strict=True)]
        yield [new[len(old) :] for new, old in zip(self.texts(generation, sampling), shown, strict=True)]

    def generate_behind(
        self,
        cache: VocoCache,
        conversations: Sequence[Conversation],
        units: Sequence[Sequence[int]],
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> Generation:
        """Answers conversations after cached units (two stages); arguments as those of `read`."""
        if not conversations or not all(units):
            raise _not_about(cache, units)
        samples = [self.lay_out(c, len(own), cache) for c, own in zip(conversations, units, strict=True)]
        *_, last = self.run_behind(cache, samples, units, one_each(sampling, seeds, len(samples)))
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
          sampling, seeds: see `read`.
        """
        samples = [self.lay_out(c, len(own)) for c, own in zip(conversations, images, strict=True)]
        *_, last = self.run_whole(samples, images, one_each(sampling, seeds, len(samples)))
        return last

    def texts(self, generation: Generation, sampling: SamplingConfig = GREEDY) -> list[str]:
        """Returns the answers as text."""
        return [self.finish(ids, sampling).text for ids in np.asarray(generation.ids_BT).tolist()]

    def finish(self, ids: Sequence[int], sampling: SamplingConfig) -> FinishedText:
        """Reads a complete answer: one row of a generation with these settings."""
        return self._answer_text(sampling).finish(ids[: sampling.max_new_tokens])

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
        record, length = conversation[-1].text if conversation else "", self.max_length + hidden * num_units
        return lay_out_prompt(record, num_units, conversation, self.template, self.tokenizer, unit, length)

    def prompt_tokens(self, sample: SampleLayout, cache: VocoCache | None = None) -> int:
        """Returns how many tokens of a prompt are read: all, or its text and what the cache holds of its units."""
        read = sample.text_start if cache is None else sample.num_units * cache.tokens_per_unit
        return len(sample) - sample.text_start + read

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
          samples: from `lay_out` with this cache.
          units: for each prompt the units before it, in order; may be none.
          samplings: one per prompt.
          every: tokens between looks at the answers; None for as few as the settings allow.

        Yields:
          The answers so far; the last one is complete.
        """
        about = [unit for row in units for unit in row]
        if about and not 0 <= min(about) <= max(about) < cache.num_units:
            raise _not_about(cache, units)
        with self._devices():
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
        with self._devices():
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
        texts = [self._answer_text(sampling) for sampling in samplings]
        longest = max(sampling.max_new_tokens for sampling in samplings)
        every = every or (LOOK_EVERY if any(text.has_stops for text in texts) else longest)
        answers = stream(self.model, prompts, prefix, self.tokenizer.eos_id, samplings, every,
                         lambda row, ids: texts[row].is_over(ids))
        while True:
            with self._devices():  # not around the yield: the caller may have a mesh of its own in force
                generation = next(answers, None)
            if generation is None:
                return
            yield Generation(generation.ids_BT[:count], generation.logits_BV[:count])

    def _about(
        self, cache: VocoCache, questions: str | Sequence[str], units: Sequence[Sequence[int]] | None
    ) -> tuple[list[Sequence[int]], list[Conversation]]:
        """Returns each question's units, and the questions as conversations."""
        questions = [questions] if isinstance(questions, str) else list(questions)
        if not all(isinstance(question, str) for question in questions):
            raise InputError("questions must be texts; give conversations to generate_behind, or use answer_many")
        about: list[Sequence[int]] = [range(cache.num_units)] * len(questions) if units is None else list(units)
        if len(about) != len(questions):
            raise InputError(f"units must be one list per question, got {len(about)} for {len(questions)} questions")
        if questions and all(about):
            return about, [(Turn("user", question),) for question in questions]
        raise _not_about(cache, about)

    def _answer_text(self, sampling: SamplingConfig) -> AnswerText:
        return AnswerText(self.tokenizer, sampling.stop, self.template.stop)

    def _devices(self) -> contextlib.AbstractContextManager[object]:
        """Returns a context in which the mesh is in force, and dtypes are the config's even with JAX_ENABLE_X64."""
        stack = contextlib.ExitStack()
        stack.enter_context(jax.enable_x64(False))
        if self.mesh is not None:
            stack.enter_context(jax.set_mesh(self.mesh))
        return stack


def _not_about(cache: VocoCache, units: Sequence[Sequence[int]]) -> InputError:
    return InputError(f"questions must be about units 0 to {cache.num_units - 1}, at least one each, got "
                        f"{[list(own) for own in units]}")
