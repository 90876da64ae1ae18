"""Images and questions in, answers out: a trained model with its tokenizer and template."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from vocojax.data.conversation import template as find_template
from vocojax.data.frame_choice import Sampling
from vocojax.errors import InputError
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.caches.files import DamagedCache
from vocojax.inference.caches.store import MissingCache, Store
from vocojax.inference.compress import BATCH, compress, require_vocos
from vocojax.inference.decoding.sampling import GREEDY, SamplingConfig, one_each
from vocojax.inference.reading import Reader
from vocojax.inference.refining import Calibration, Refined, checked, read_calibration, refine
from vocojax.inference.requests import Questions, asked_about, conversations_of
from vocojax.inference.video import Policy, VideoSession, compress_video
from vocojax.inference.visuals import Video, Visual, VisualSource, listed, prepare_visual
from vocojax.layout import Visibility, units_stand_alone
from vocojax.models.voco import VocoLlama
from vocojax.pretrained.loading import model_of
from vocojax.pretrained.processor import ImageSource
from vocojax.pretrained.source import open_source


class Assistant(Reader):
    """A model that answers questions about images.

        assistant = Assistant.from_run("runs/quickstart/seed_0/voco_1")
        assistant.answer("photo.png", "what color is the shape?")  # the way the model was trained
        cache = assistant.compress("photo.png")                    # once
        assistant.read(cache, "what color is the shape?")          # as often as you like

    `inference.many.answer_many` answers many requests, each with its own images and settings.

    Attributes:
      calibration: the rule of `vocos="auto"`, if there is one beside the checkpoint. The others are `Reader`'s.
    """

    calibration: Calibration | None = None

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
          num_vocos: VoCo tokens per image, if the directory does not say it; None for the default of `open_source`.
          template: name of the template, if the directory does not say it; None for the default of `open_source`.
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
        assistant = cls(model, card.tokenizer, written, visibility or card.visibility, card.fit, mesh=mesh)
        assistant.calibration = read_calibration(directory)
        return assistant

    def with_model(self, model: VocoLlama) -> "Assistant":
        """Returns an assistant that answers with another model, and is the same otherwise."""
        return Assistant(model, self.tokenizer, self.template, self.visibility, self.processor.fit, self.max_length,
                         self.mesh)

    def require_caches(self) -> None:
        """Raises `InputError` if the model does not answer from VoCo caches: compressing would be work for nothing."""
        require_vocos(self.model.config)
        if not self.reads_caches:
            raise InputError("this model was trained without the VoCo mask, so it reads whole images: ask by "
                             "Assistant.answer or answer_many, or load it with visibility='voco' to use that mask")

    @property
    def reads_caches(self) -> bool:
        """True if the model answers from VoCo caches; bounds and baselines read whole images."""
        return units_stand_alone(self.visibility) and self.processor.unit.vocos > 0

    def load_images(self, images: ImageSource | Sequence[ImageSource]) -> list[np.ndarray]:
        """Prepares one or several images as one unit each; `ImageError` names the first that can't be used."""
        return self.processor.load_images(images)

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
          InputError: there are none, or the model does not answer from VoCo tokens.
        """
        self.require_caches()
        units = [unit for source in listed(images) for unit in self.visual(source).units]
        with self.runner.devices():
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

    def compress_video(
        self, path: str | Path, frames: int = 8, sampling: Sampling = "uniform", seconds: float = 120.0,
        store: Store | None = None, batch_size: int = BATCH,
    ) -> VocoCache:
        """Compresses a video of any length batch by batch; memory does not grow with its pixels.

        Args:
          path: the file, or a directory of frames.
          frames: see `Video`.
          sampling: see `Video`.
          seconds: see `Video`.
          store: where caches of frames are sought and put, each frame a visual of its own; None for no store.
          batch_size: frames that are decoded and compressed at once.

        Returns:
          The cache of the frames, in their order.

        Raises:
          ImageError: the video can't be used.
        """
        return compress_video(self, Video(path, frames, sampling, seconds), store, batch_size)

    def video(
        self, limit: int | None = None, policy: Policy = "error", store: Store | None = None, batch_size: int = BATCH
    ) -> VideoSession:
        """Begins a video that arrives frame by frame; see `VideoSession`."""
        return VideoSession(self, limit, policy, store, batch_size)

    def caches_of(
        self, visuals: Sequence[Visual], store: Store | None = None, batch_size: int = BATCH
    ) -> list[VocoCache]:
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
            if store is not None:
                store.require_writable()
            new = self.compress(list(missing.values()), batch_size).split(
                [len(visual.units) for visual in missing.values()])
            caches |= dict(zip(missing, new, strict=True))
            if store is not None:
                for cache in new:
                    store.put_visual(cache)
        return [caches[visual.digest] for visual in visuals]

    def answer(
        self,
        images: VisualSource | Sequence[VisualSource],
        questions: Questions,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Answers questions the way the model was trained: from the VoCo tokens of images, or from whole images.

        Args:
          images: one or several files, images, videos or prepared units, which all questions are about; () for
            questions without an image.
          questions: see `read`.
          sampling: see `read`.
          seeds: see `read`.

        Returns:
          One answer per question.

        Raises:
          ImageError: an image can't be used.
          LayoutError: a question is too long.
        """
        asked = conversations_of(questions)
        visuals = [self.visual(source) for source in listed(images)]
        if visuals and self.reads_caches:
            return self.read(VocoCache.concat(self.caches_of(visuals)), asked, None, sampling, seeds)
        units = [unit for visual in visuals for unit in visual.units]
        return self.texts(self.generate_whole([units] * len(asked), asked, sampling, seeds), sampling)

    def read(
        self,
        cache: VocoCache,
        questions: Questions,
        units: Sequence[Sequence[int]] | None = None,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
        vocos: int | Literal["auto"] | None = None,
    ) -> list[str]:
        """Answers questions about cached images.

        Args:
          cache: of the images.
          questions: one or several texts, or conversations whose last turn is the user's (`Turn`s).
          units: for each question the units it is about, in order; by default all of them. One list for one question.
          sampling: how the answers' tokens are chosen.
          seeds: for each question the seed of its draws; by default `sampling.seed` plus its index.
          vocos: how many VoCo tokens of each unit are read; None for all, "auto" for `refine`.

        Returns:
          One answer per question.

        Raises:
          CacheError: the cache is another model's, or not of the tokens that this model's text sees.
          InputError: a question is about no unit, or about one that is not in the cache.
          LayoutError: a question is too long.
        """
        if vocos == "auto":
            return self.refine(cache, questions, units, sampling).texts
        cache = cache if vocos is None else cache.truncate(vocos)
        units, asked = asked_about(cache, questions, units)
        return self.texts(self.generate_behind(cache, asked, units, sampling, seeds), sampling)

    def refine(
        self, cache: VocoCache, questions: Questions, units: Sequence[Sequence[int]] | None = None,
        sampling: SamplingConfig = GREEDY,
    ) -> Refined:
        """Answers from few of a cache's tokens, and from more where the answer's entropy says so.

        Args:
          cache: of the images, with all VoCo tokens.
          questions: see `read`.
          units: see `read`.
          sampling: see `read`; greedy.

        Returns:
          The answers, and how many tokens of each unit each was read from.

        Raises:
          InputError: the checkpoint has no calibration for this model, this cache or this sampling; or see `read`.
        """
        units, asked = asked_about(cache, questions, units)
        calibration = checked(self.calibration, self.fingerprint.digest, cache.tokens_per_unit, sampling)

        def ask(places: Sequence[int], vocos: int) -> tuple[list[str], np.ndarray]:
            generation = self.generate_behind(cache.truncate(vocos), [asked[place] for place in places],
                                              [units[place] for place in places], sampling)
            return self.texts(generation, sampling), np.asarray(generation.logits_BV)

        return refine(ask, len(asked), calibration)

    def stream(
        self,
        cache: VocoCache,
        questions: Questions,
        units: Sequence[Sequence[int]] | None = None,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
        every: int = 1,
    ) -> Iterator[list[str]]:
        """Answers like `read`, showing the answers while they are written.

        Args:
          cache: see `read`.
          questions: see `read`.
          units: see `read`.
          sampling: see `read`.
          seeds: see `read`.
          every: tokens between two looks at the answers.

        Yields:
          The new text of each answer, '' for nothing; the pieces of an answer put together are `read`'s.
        """
        units, asked = asked_about(cache, questions, units)
        samplings = one_each(sampling, seeds, len(asked))
        text, shown = self.runner.answer_text(sampling), [""] * len(asked)
        samples = [self.lay_out(conversation, len(own), cache) for conversation, own in zip(asked, units, strict=True)]
        for generation in self.runner.run_behind(cache, samples, units, samplings, every):
            now = [text.sure(ids) for ids in generation.ids_BT.tolist()]
            yield [new[len(old) :] for new, old in zip(now, shown, strict=True)]
            shown = [max(new, old, key=len) for new, old in zip(now, shown, strict=True)]
        yield [new[len(old) :] for new, old in zip(self.texts(generation, sampling), shown, strict=True)]
