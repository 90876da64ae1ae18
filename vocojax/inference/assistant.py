"""Images and questions in, answers out: a trained run with its tokenizer and template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vocojax.data.conversation import Conversation, Template, Turn, template
from vocojax.data.images import Fit, load_image
from vocojax.data.loader import unit_shape
from vocojax.data.tokenizer import Tokenizer
from vocojax.inference.cache import VocoCache, place
from vocojax.inference.compress import compress
from vocojax.inference.decode import GREEDY, Generation, SamplingConfig, generate
from vocojax.inference.prompts import bucket, lay_out_prompt, text_rows, whole_rows
from vocojax.layout import SampleLayout, Visibility
from vocojax.models.llama import KeyValues
from vocojax.models.voco import Rows, VocoLlama
from vocojax.training.checkpoints import load_model, run_config


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
    """

    model: VocoLlama
    tokenizer: Tokenizer
    template: Template
    visibility: Visibility = "voco"
    fit: Fit = "pad"
    max_length: int = 2048

    @classmethod
    def from_run(
        cls, workdir: str | Path, visibility: Visibility | None = None, dtype: DTypeLike = jnp.float32
    ) -> "Assistant":
        """Loads a run of `training.stage.train`; visibility defaults to the one it was trained with."""
        config = run_config(workdir)
        data = config["data"]
        return cls(
            model=load_model(workdir, dtype),
            tokenizer=Tokenizer.from_directory(Path(workdir) / "tokenizer"),
            template=template(data["template"]),
            visibility=visibility or config["visibility"],
            fit=data["fit"],
        )

    def load_images(self, paths: Sequence[str | Path]) -> list[np.ndarray]:
        """Prepared images; `ImageError` names the first that can't be used."""
        return [load_image(path, self.model.config.vision.image_size, self.fit) for path in paths]

    def compress(self, paths: Sequence[str | Path]) -> VocoCache:
        """Compresses image files, one unit each."""
        return compress(self.model, self.tokenizer, self.load_images(paths))

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
        """
        about = [list(range(cache.num_units))] * len(questions) if units is None else [list(u) for u in units]
        generation = self.generate_behind(cache, [self._ask(q) for q in questions], about, sampling, seeds)
        return self.texts(generation)

    def generate_behind(
        self,
        cache: VocoCache,
        conversations: Sequence[Conversation],
        units: Sequence[Sequence[int]],
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> Generation:
        """Reads conversations behind cached units (two stages)."""
        about = sorted({unit for row in units for unit in row})
        if not conversations or any(not row for row in units) or about[0] < 0 or about[-1] >= cache.num_units:
            raise ValueError(f"questions must be about units 0 to {cache.num_units - 1}, at least one each, "
                             f"got {units}")
        shape = unit_shape(self.model.config)
        if self.visibility == "causal" and (cache.tokens_per_unit < sum(shape) or max(map(len, units)) > 1):
            raise ValueError("a causal model reads whole units, one to a prompt: keep all of a unit's tokens "
                             "(compress_keeping), or read with visibility='voco'")
        hidden = max(0, sum(shape) - cache.tokens_per_unit)
        samples = self._lay_out(conversations, [len(u) for u in units], self.max_length + hidden * max(map(len, units)))
        slots = max(map(len, units))
        placed = place(cache, np.array([[*u, *[-1] * (slots - len(u))] for u in units]), self.model.config.decoder)
        cached = [len(u) * cache.tokens_per_unit for u in units]
        lengths = [len(s) - s.text_start for s in samples]
        rows = text_rows(samples, self.visibility, cached, placed.length, bucket(max(lengths)))
        return self._generate(rows, lengths, placed, sampling, seeds)

    def generate_whole(
        self,
        images: Sequence[Sequence[np.ndarray]],
        conversations: Sequence[Conversation],
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> Generation:
        """Reads conversations together with their prepared images (single pass)."""
        samples = self._lay_out(conversations, [len(i) for i in images], self.max_length)
        lengths = [len(s) for s in samples]
        rows = whole_rows(samples, images, self.model.config, self.visibility, bucket(max(lengths)))
        return self._generate(rows, lengths, None, sampling, seeds)

    def texts(self, generation: Generation) -> list[str]:
        """The answers as text."""
        answers = []
        for ids in np.asarray(generation.ids_BT).tolist():
            end = ids.index(self.tokenizer.eos_id) if self.tokenizer.eos_id in ids else len(ids)
            text = self.tokenizer.decode(ids[:end])
            answers.append((text.split(self.template.stop)[0] if self.template.stop else text).strip())
        return answers

    def _ask(self, question: str) -> Conversation:
        return (Turn("user", question),)

    def _lay_out(
        self, conversations: Sequence[Conversation], num_units: Sequence[int], max_length: int
    ) -> list[SampleLayout]:
        unit = unit_shape(self.model.config)
        return [
            lay_out_prompt(c[-1].text if c else "", n, c, self.template, self.tokenizer, unit, max_length)
            for c, n in zip(conversations, num_units, strict=True)
        ]

    def _generate(
        self, rows: Rows, lengths: Sequence[int], prefix: KeyValues | None, sampling: SamplingConfig,
        seeds: Sequence[int] | None,
    ) -> Generation:
        seeds = range(len(lengths)) if seeds is None else seeds
        return generate(
            self.model, jax.tree.map(jnp.asarray, rows), jnp.array(lengths, jnp.int32), prefix,
            jnp.array(list(seeds), jnp.uint32), end_id=self.tokenizer.eos_id, sampling=sampling,
        )
