"""Images and questions in, answers out: a trained model with its tokenizer and template."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from vocojax.config import require
from vocojax.data.conversation import Conversation, Template, Turn, template
from vocojax.data.images import Fit, load_image
from vocojax.data.tokenizer import Tokenizer
from vocojax.errors import InputError
from vocojax.inference.caches.cache import CacheError, VocoCache, place, require_model
from vocojax.inference.caches.files import DamagedCache
from vocojax.inference.caches.fingerprint import Fingerprint, fingerprint, image_digest
from vocojax.inference.caches.store import MissingCache, Store
from vocojax.inference.compress import BATCH, compress
from vocojax.inference.decoding.decode import LOOK_EVERY, Generation, Prompts, stream
from vocojax.inference.decoding.sampling import GREEDY, SEEDS, SamplingConfig
from vocojax.inference.decoding.text import AnswerText
from vocojax.inference.prompts import batch_bucket, bucket, lay_out_prompt, text_rows, whole_rows
from vocojax.layout import SampleLayout, UnitShape, Visibility, lay_out_unit, unit_shape
from vocojax.models.llama import KeyValues
from vocojax.models.voco import Rows, VocoLlama
from vocojax.parallel.mesh import place_rows, row_multiple
from vocojax.pretrained.loading import load_model
from vocojax.pretrained.processor import Processor
from vocojax.runs.directory import run_config
from vocojax.runs.parameters import load_model as load_run_model


@dataclass(frozen=True)
class Assistant:
    """A model that answers questions about images.

        assistant = Assistant.from_run("runs/quickstart/seed_0/voco_1")
        cache = assistant.compress(["photo.png"])            # once
        assistant.read(cache, ["what color is the shape?"])  # as often as you like

    Attributes:
      visibility: `voco`, or `causal` to evaluate a bound or a baseline.
      fit: how images become square.
      max_length: the longest prompt, in tokens; behind a cache, an image counts the tokens that are cached of it.
      mesh: the devices that the model's parameters lie on; None for one device.
    """

    model: VocoLlama
    tokenizer: Tokenizer
    template: Template
    visibility: Visibility = "voco"
    fit: Fit = "pad"
    max_length: int = 2048
    mesh: Mesh | None = None

    @classmethod
    def from_run(
        cls, workdir: str | Path, visibility: Visibility | None = None, dtype: DTypeLike = jnp.float32
    ) -> "Assistant":
        """Loads a run of `training.stage.train`; visibility defaults to the one it was trained with.

        Raises:
          ConfigError: the run was trained with several units per image.
        """
        config = run_config(workdir)
        data = config["data"]
        _require_one_unit(data["fit"], workdir)
        return cls(
            model=load_run_model(workdir, dtype),
            tokenizer=Tokenizer.from_directory(Path(workdir) / "tokenizer"),
            template=template(data["template"]),
            visibility=visibility or config["visibility"],
            fit=data["fit"],
        )

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, mesh: Mesh | None = None, dtype: DTypeLike | None = None
    ) -> "Assistant":
        """Loads weights in any layout that `load_model` knows, runs included, to read VoCo tokens.

        Args:
          mesh: where the parameters go (`inference.mesh.local_mesh`); None for the first device.
          dtype: of parameters and computation; None keeps the decoder's on disk.

        Raises:
          ConvertError: names the file and the remedy.
          ConfigError: the model was trained with several units per image.
        """
        processor = Processor.from_pretrained(directory)
        _require_one_unit(processor.fit, directory)
        model = load_model(directory, mesh=mesh, dtype=dtype)
        return cls(model, processor.tokenizer, processor.template, fit=processor.fit, mesh=mesh)

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """What this model's caches are recognised by; computed once."""
        with self._devices():
            return fingerprint(self.model, self.tokenizer)

    def load_images(self, paths: Sequence[str | Path]) -> list[np.ndarray]:
        """Prepared images; `ImageError` names the first that can't be used."""
        return [load_image(path, self.model.config.vision.image_size, self.fit) for path in paths]

    def compress(self, images: Sequence[str | Path | np.ndarray], batch_size: int = BATCH) -> VocoCache:
        """Compresses images, files or prepared ones, a unit each, at most `batch_size` at once."""
        prepared = [x if isinstance(x, np.ndarray) else self.load_images([x])[0] for x in images]
        with self._devices():
            return compress(self.model, self.tokenizer, prepared, self.fingerprint, batch_size)

    def recall(
        self, store: Store, images: Sequence[str | Path | np.ndarray], num_vocos: int | None = None
    ) -> VocoCache:
        """The images' caches from a store, a unit each; those that are missing or damaged are compressed and put in.

        Args:
          num_vocos: how many VoCo tokens of each are read; None for all that the model makes.
        """
        prepared = [x if isinstance(x, np.ndarray) else self.load_images([x])[0] for x in images]
        made, caches = self.model.config.unit_vocos, {}
        missing: dict[str, np.ndarray] = {}
        for digest, image in zip(map(image_digest, prepared), prepared, strict=True):
            try:
                caches[digest] = store.get(digest, self.fingerprint, made)
            except (MissingCache, DamagedCache):
                missing[digest] = image
        if missing:
            new = self.compress(list(missing.values()))
            store.put(new)
            caches |= {digest: new.take(slice(unit, unit + 1)) for unit, digest in enumerate(new.images)}
        joined = VocoCache.concat([caches[image_digest(image)] for image in prepared])
        return joined if num_vocos is None else joined.truncate(num_vocos)

    def read(
        self,
        cache: VocoCache,
        questions: Sequence[str],
        units: Sequence[Sequence[int]] | None = None,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Answers questions about cached images.

        Args:
          units: for each question the units it is about, in order; by default all of them.
          seeds: for each question the seed of its draws; by default its index.

        Raises:
          CacheError: the cache is another model's, or not of the tokens that this model's text sees.
        """
        units, asked = self._about(cache, questions, units), [self._ask(q) for q in questions]
        return self.texts(self.generate_behind(cache, asked, units, sampling, seeds), sampling)

    def stream(
        self,
        cache: VocoCache,
        questions: Sequence[str],
        units: Sequence[Sequence[int]] | None = None,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
        every: int = 1,
    ) -> Iterator[list[str]]:
        """Like `read`, yielding after every few tokens what is new of each answer's text, '' for nothing; the pieces
        of an answer put together are `read`'s."""
        units, asked = self._about(cache, questions, units), [self._ask(q) for q in questions]
        text, shown = self._answer_text(sampling), [""] * len(questions)
        for generation in self._behind(cache, asked, units, sampling, seeds, every):
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
        """Reads conversations behind cached units (two stages)."""
        *_, last = self._behind(cache, conversations, units, sampling, seeds)
        return last

    def generate_whole(
        self,
        images: Sequence[Sequence[np.ndarray]],
        conversations: Sequence[Conversation],
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> Generation:
        """Reads conversations together with their prepared images (single pass)."""
        count = len(conversations)
        with self._devices():
            fill = -count % row_multiple()
        images, conversations = [*images, *[images[-1]] * fill], [*conversations, *[conversations[-1]] * fill]
        samples = self._lay_out(conversations, [len(i) for i in images], unit_shape(self.model.config), self.max_length)
        lengths = [len(s) for s in samples]
        seeds = [*(range(count) if seeds is None else seeds), *[0] * fill]
        rows = whole_rows(samples, images, self.model.config, self.visibility, bucket(max(lengths)))
        *_, last = self._answers(rows, lengths, [s.text_start for s in samples], None, sampling, seeds)
        return Generation(last.ids_BT[:count], last.logits_BV[:count])

    def texts(self, generation: Generation, sampling: SamplingConfig = GREEDY) -> list[str]:
        """The answers as text."""
        text = self._answer_text(sampling)
        return [text.whole(ids) for ids in np.asarray(generation.ids_BT).tolist()]

    def _behind(
        self, cache: VocoCache, conversations: Sequence[Conversation], units: Sequence[Sequence[int]],
        sampling: SamplingConfig, seeds: Sequence[int] | None, every: int | None = None,
    ) -> Iterator[Generation]:
        about = sorted({unit for row in units for unit in row})
        if not conversations or any(not row for row in units) or about[0] < 0 or about[-1] >= cache.num_units:
            raise InputError(f"questions must be about units 0 to {cache.num_units - 1}, at least one each, "
                             f"got {units}")
        unit = self._unit_behind(cache, max(map(len, units)))
        kept = cache.tokens_per_unit
        hidden = max(0, sum(unit) - kept)
        samples = self._lay_out(
            conversations, [len(u) for u in units], unit, self.max_length + hidden * max(map(len, units))
        )
        # Rows and slots are filled up to sizes that few programs serve; the rows added repeat the last one.
        count = len(samples)
        with self._devices():
            fill = batch_bucket(count) - count
        samples, units = [*samples, *[samples[-1]] * fill], [*units, *[units[-1]] * fill]
        slots = 1 << (max(map(len, units)) - 1).bit_length()
        lengths = [len(s) - s.text_start for s in samples]
        rows = text_rows(samples, self.visibility, [len(u) * kept for u in units], slots * kept, bucket(max(lengths)))
        with self._devices():
            prefix = place(cache, np.array([[*u, *[-1] * (slots - len(u))] for u in units]), self.model.config.decoder)
        seeds = range(count) if seeds is None else seeds
        for generation in self._answers(rows, lengths, [0] * len(samples), prefix, sampling, [*seeds, *[0] * fill],
                                        every):
            yield Generation(generation.ids_BT[:count], generation.logits_BV[:count])

    def _answers(
        self, rows: Rows, lengths: Sequence[int], text_starts: Sequence[int], prefix: KeyValues | None,
        sampling: SamplingConfig, seeds: Sequence[int], every: int | None = None,
    ) -> Iterator[Generation]:
        if not all(0 <= seed < SEEDS for seed in seeds):
            raise InputError(f"seeds must be in [0, 2**32), got {list(seeds)}")
        vectors = (np.array(lengths, np.int32), np.array(text_starts, np.int32), np.array(seeds, np.uint32))
        prompts = Prompts(rows, *vectors)  # type: ignore[arg-type]
        text = self._answer_text(sampling)
        every = every or (LOOK_EVERY if text.stops else sampling.max_new_tokens)
        with self._devices():
            prompts = place_rows(prompts)
        answers = stream(self.model, prompts, prefix, self.tokenizer.eos_id, sampling, every, text.is_over)
        while True:
            with self._devices():  # and not around the yield: the caller's mesh is his own
                generation = next(answers, None)
            if generation is None:
                return
            yield generation

    def _about(
        self, cache: VocoCache, questions: Sequence[str], units: Sequence[Sequence[int]] | None
    ) -> list[list[int]]:
        return [list(range(cache.num_units))] * len(questions) if units is None else [list(u) for u in units]

    def _ask(self, question: str) -> Conversation:
        return (Turn("user", question),)

    def _answer_text(self, sampling: SamplingConfig) -> AnswerText:
        return AnswerText(self.tokenizer, (*sampling.stop, *([self.template.stop] if self.template.stop else [])))

    def _unit_behind(self, cache: VocoCache, most_units: int) -> UnitShape:
        """The shape of the units that a cache is of; `CacheError` if this model's text does not see what it keeps."""
        if cache.model is not None:
            require_model(cache, self.fingerprint, "the cache")
        unit, kept = unit_shape(self.model.config), cache.tokens_per_unit
        length = len(lay_out_unit("unit", self.tokenizer, unit))
        if self.visibility == "causal":
            if cache.position != 0 or kept != length or most_units > 1:
                raise CacheError("a causal model reads whole units, one to a prompt: keep all of a unit's tokens "
                                 "(compress_keeping), or read with visibility='voco'")
            return unit
        if cache.position != length - unit.vocos:
            raise CacheError(f"the cache keeps tokens from position {cache.position} of a unit, text sees those from "
                             f"{length - unit.vocos} on: compress without keeping more than VoCo tokens")
        return UnitShape(unit.tokens, kept)

    def _lay_out(
        self, conversations: Sequence[Conversation], num_units: Sequence[int], unit: UnitShape, max_length: int
    ) -> list[SampleLayout]:
        return [
            lay_out_prompt(c[-1].text if c else "", n, c, self.template, self.tokenizer, unit, max_length)
            for c, n in zip(conversations, num_units, strict=True)
        ]

    def _devices(self) -> contextlib.AbstractContextManager[object]:
        """The mesh in force while something runs."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def _require_one_unit(fit: Fit, where: str | Path) -> None:
    require(fit != "anyres", f"{where}: data.fit",
            "must make one unit of an image, as an assistant does: train with 'pad', 'pad_white', 'crop' or 'square'",
            fit)
