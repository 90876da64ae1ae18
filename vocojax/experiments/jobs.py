"""The training runs that an experiment consists of: one per stage and seed, run two at a time on a CPU."""

import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import jax
from ml_collections import ConfigDict

from vocojax.config import ModelConfig, build
from vocojax.data.sources.easy_vqa import EasyVqaCaptions
from vocojax.data.tokenizer import Tokenizer, word_tokenizer
from vocojax.experiments.contrastive import ContrastiveConfig, pretrain_vision
from vocojax.experiments.mosaic_tower import TileTowerConfig, pretrain_tower
from vocojax.training.config import StageConfig, stage_config
from vocojax.training.stage import train

Item = TypeVar("Item")
Value = TypeVar("Value")
VISION = "vision"  # the stage that pretrains the vision tower


@dataclass(frozen=True)
class Job:
    """One training run: a stage's, or the vision tower's.

    Attributes:
      name: under which its seconds are reported.
      config: of the run.
      workdir: of the run.
      tokenizer: directory of the captions' tokenizer.
    """

    name: str
    config: StageConfig | ContrastiveConfig | TileTowerConfig
    workdir: Path
    tokenizer: Path


def run_job(job: Job, position: int = 0) -> float:
    """Runs a job and returns its seconds; `position` is its progress bar's line among those of parallel jobs."""
    started = time.perf_counter()
    if isinstance(job.config, ContrastiveConfig):
        tokenizer = Tokenizer.from_directory(job.tokenizer)
        pretrain_vision(job.config, EasyVqaCaptions("train"), tokenizer, job.workdir, position)
    elif isinstance(job.config, TileTowerConfig):
        pretrain_tower(job.config, job.workdir, position)
    else:
        train(job.config, job.workdir, position)
    return time.perf_counter() - started


def share_compilations(workdir: Path) -> None:
    """Lets stages and seeds share their compiled programs, so that each is compiled once.

    Where JAX has a directory already (JAX_COMPILATION_CACHE_DIR), that one is used.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@dataclass
class Runs:
    """An experiment's runs: each stage once for every seed, in WORKDIR/seed_S/STAGE. Finished ones are not repeated.

    Attributes:
      get_config: returns a stage's config by its name.
      config_file: that it comes from, for errors.
      workdir: of the experiment.
      steps: number of steps by stage, in place of the configs'; also of `vision`.
      seconds: that each part of the experiment took.
    """

    get_config: Callable[[str], ConfigDict]
    config_file: str
    workdir: Path
    steps: Mapping[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Path:
        """Directory of the tokenizer that all stages share."""
        return self.workdir / "tokenizer"

    def directory(self, seed: int, stage: str) -> Path:
        """Returns the directory of a run."""
        return self.workdir / f"seed_{seed}" / stage

    def model(self, stage: str) -> ModelConfig:
        """Returns a stage's model."""
        return build(ModelConfig, json.loads(self.get_config(stage).model.to_json()), "model")

    def make_tokenizer(self, texts: Iterable[str]) -> None:
        """Writes a word tokenizer of the texts."""
        word_tokenizer(texts).save(self.tokenizer)

    def vision_job(self, seed: int, stage: str) -> Job:
        """Returns the job that pretrains the vision tower of a stage's model."""
        config = ContrastiveConfig(self.model(stage).vision, len(Tokenizer.from_directory(self.tokenizer)), seed=seed)
        config = dataclasses.replace(config, steps=self.steps.get(VISION, config.steps))
        return Job(VISION, config, self.directory(seed, VISION), self.tokenizer)

    def tower_job(self, seed: int, stage: str) -> Job:
        """Returns the job that pretrains the vision tower of a stage's model on mosaics."""
        config = TileTowerConfig(self.model(stage).vision, seed=seed)
        config = dataclasses.replace(config, steps=self.steps.get(VISION, config.steps))
        return Job(VISION, config, self.directory(seed, VISION), self.tokenizer)

    def stage_job(self, seed: int, stage: str, init_from: str, teacher: str = "") -> Job:
        """Returns a stage's job.

        Args:
          seed: of the run.
          stage: its name.
          init_from: the stage of the same seed that it starts from.
          teacher: the stage of the same seed that it is distilled from; '' for none.
        """
        values = self.get_config(stage)
        values.seed = seed
        values.data.tokenizer = str(self.tokenizer)
        values.init_from = str(self.directory(seed, init_from))
        if teacher:
            values.distill.teacher = str(self.directory(seed, teacher))
        values.steps = self.steps.get(stage, values.steps)
        return Job(stage, stage_config(values, self.config_file), self.directory(seed, stage), self.tokenizer)

    def train(self, jobs: Sequence[Job]) -> None:
        """Runs the jobs, two at a time on a CPU."""
        seconds = self.each(run_job, jobs)
        for job, taken in zip(jobs, seconds, strict=True):
            self.seconds[job.name] = self.seconds.get(job.name, 0.0) + taken

    def each(self, function: Callable[[Item, int], Value], items: Sequence[Item]) -> list[Value]:
        """Returns the function's values, from two processes on a CPU: such small models keep one core busy, not two.

        Args:
          function: of an item and the line of its progress bar; of a module, as is the item's class.
          items: what it is applied to, in order.
        """
        if len(items) == 1 or jax.default_backend() != "cpu" or (os.cpu_count() or 1) < 2:
            return [function(item, 0) for item in items]
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, fresh, share_compilations, (self.workdir,)) as pool:
            return list(pool.map(function, items, range(len(items))))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time that is spent in the context to `seconds`."""
        before = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - before
