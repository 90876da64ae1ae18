"""The whole method on a small public data set: trains every stage, compresses, reads and prints what is retained."""

import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vocojax.config import ModelConfig, build
from vocojax.data.conversation import Turn, template
from vocojax.data.sources.easy_vqa import EasyVqaCaptions, EasyVqaSource
from vocojax.data.tokenizer import Tokenizer, word_tokenizer
from vocojax.evaluation import report
from vocojax.evaluation.benchmarks.base import Benchmark, Item
from vocojax.evaluation.benchmarks.registry import open_benchmark
from vocojax.evaluation.metrics import accuracy_by_kind
from vocojax.evaluation.retention import Score, format_table, table
from vocojax.experiments.contrastive import ContrastiveConfig, pretrain_vision
from vocojax.files import write_atomically
from vocojax.inference.assistant import Assistant
from vocojax.inference.many import Way, answer_many
from vocojax.inference.requests import Answer, Request
from vocojax.layout import Visibility, lay_out_sample, unit_shape
from vocojax.training.config import StageConfig, stage_config
from vocojax.training.stage import train

UPPER, LOWER = "Upper Bound", "Lower Bound"


@dataclass(frozen=True)
class Arm:
    """A row of the retention table.

    Attributes:
      name: shown in the table.
      stage: whose run is read.
      visibility: the mask that it is read through.
    """

    name: str
    stage: str
    visibility: Visibility


VOCO_1 = Arm("VoCo-1", "voco_1", "voco")
ARMS = (
    Arm(UPPER, "upper_bound", "causal"),
    VOCO_1,
    Arm(LOWER, "upper_bound", "voco"),
)
FURTHER_ARMS = (
    Arm("VoCo-2", "voco_2", "voco"),
    Arm("VoCo-8", "voco_8", "voco"),
    Arm("Avg. Pool + Linear", "avg_pool", "causal"),
    Arm("Q-Former (1 query)", "qformer", "causal"),
    Arm("Downsampled image (1 token)", "downsample", "causal"),
    Arm("Random (1 token)", "random", "causal"),
)


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
    config: StageConfig | ContrastiveConfig
    workdir: Path
    tokenizer: Path


def run_job(job: Job, position: int = 0) -> float:
    """Runs a job and returns its seconds; `position` is its progress bar's line among those of parallel jobs."""
    started = time.perf_counter()
    if isinstance(job.config, ContrastiveConfig):
        tokenizer = Tokenizer.from_directory(job.tokenizer)
        pretrain_vision(job.config, EasyVqaCaptions("train"), tokenizer, job.workdir, position)
    else:
        train(job.config, job.workdir, position)
    return time.perf_counter() - started


def _set_up_compilation(workdir: Path) -> None:
    """Lets stages and seeds share their compiled programs, so that each is compiled once."""
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@dataclass
class Quickstart:
    """The trainings and evaluations of the retention table.

    Attributes:
      get_config: returns a stage's config by its name (`configs/quickstart.py`).
      workdir: for runs and results; runs that are finished in it are not repeated.
      seeds: everything is trained once for each.
      full: whether to add the baselines and more VoCo tokens.
      steps: number of steps by stage, in place of the configs'; also of `vision`.
      test_images: how many images to evaluate on; None is all.
      seconds: that each part took, filled by `run`.
    """

    get_config: Callable[[str], ConfigDict]
    workdir: Path
    seeds: Sequence[int] = (0,)
    full: bool = False
    steps: Mapping[str, int] = field(default_factory=dict)
    test_images: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Trains, evaluates, prints the table, writes retention.json and report.html; returns the former's content."""
        _set_up_compilation(self.workdir)
        started = time.perf_counter()
        arms = ARMS + (FURTHER_ARMS if self.full else ())
        self._make_tokenizer()
        self._run_jobs([self._vision_job(seed) for seed in self.seeds])
        self._run_jobs([self._stage_job(seed, "alignment") for seed in self.seeds])
        stages = dict.fromkeys(arm.stage for arm in arms)
        self._run_jobs([self._stage_job(seed, stage) for seed in self.seeds for stage in stages])
        benchmark = open_benchmark("easy_vqa", self.workdir)
        items = _about_first_images(benchmark.items, self.test_images)
        requests = benchmark.requests(items)
        with self._timed("evaluation"):
            answers = {arm.name: [self._answer(requests, arm, seed) for seed in self.seeds] for arm in arms}
        with self._timed("two-stage check"):
            two_stage = self._check_two_stages(requests, answers[VOCO_1.name][0])
        self.seconds["total"] = time.perf_counter() - started
        scores: dict[str, list[Score]] = {
            name: [_score(benchmark, items, run) for run in runs] for name, runs in answers.items()
        }
        rows = table(scores, LOWER, UPPER)
        result: dict[str, Any] = {
            "rows": rows,
            "seeds": list(self.seeds),
            "vision_tokens": self._model("voco_1").unit_tokens,
            "two_stage": two_stage,
            "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
        }
        write_atomically(self.workdir / "retention.json", json.dumps(result, indent=2) + "\n")
        self._write_report(result, items, answers, arms)
        print(format_table(rows))
        return result

    def _make_tokenizer(self) -> None:
        """Writes a word tokenizer of the training questions."""
        questions = [q for group in EasyVqaSource("train").questions for q in group]
        tokenizer = word_tokenizer(f"{q.text} {q.answer}" for q in questions)
        tokenizer.save(self.workdir / "tokenizer")

    def _vision_job(self, seed: int) -> "Job":
        tokens = len(Tokenizer.from_directory(self.workdir / "tokenizer"))
        config = ContrastiveConfig(self._model("voco_1").vision, tokens, seed=seed)
        config = dataclasses.replace(config, steps=self.steps.get("vision", config.steps))
        return Job("vision", config, self._run(seed, "vision"), self.workdir / "tokenizer")

    def _stage_job(self, seed: int, stage: str) -> "Job":
        """Returns a stage's job: the alignment starts from the vision tower, every other stage from the alignment."""
        values = self.get_config(stage)
        values.seed = seed
        values.data.tokenizer = str(self.workdir / "tokenizer")
        values.init_from = str(self._run(seed, "vision" if stage == "alignment" else "alignment"))
        values.steps = self.steps.get(stage, values.steps)
        config = stage_config(values, "configs/quickstart.py")
        return Job(stage, config, self._run(seed, stage), self.workdir / "tokenizer")

    def _run_jobs(self, jobs: "Sequence[Job]") -> None:
        """Runs the jobs, two at a time on a CPU: such small models keep one core busy, not two."""
        if len(jobs) == 1 or jax.default_backend() != "cpu" or (os.cpu_count() or 1) < 2:
            seconds = [run_job(job) for job in jobs]
        else:
            fresh = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(2, fresh, _set_up_compilation, (self.workdir,)) as pool:
                seconds = list(pool.map(run_job, jobs, range(len(jobs))))
        for job, taken in zip(jobs, seconds, strict=True):
            self.seconds[job.name] = self.seconds.get(job.name, 0.0) + taken

    def _answer(self, requests: Sequence[Request], arm: Arm, seed: int, way: Way = "single pass") -> list[Answer]:
        assistant = Assistant.from_run(self._run(seed, arm.stage), arm.visibility)
        return list(answer_many(assistant, requests, way=way, batch_size=256, with_logits=True))

    def _check_two_stages(self, requests: Sequence[Request], single_pass: Sequence[Answer]) -> dict[str, float | int]:
        """Compares answers from a VoCo cache with those of the single pass."""
        cached = self._answer(requests, VOCO_1, self.seeds[0], "caches")
        logits_2QV = np.array([[answer.first_logits_V for answer in answers] for answers in (cached, single_pass)])
        is_token = np.isfinite(logits_2QV[1])  # all but the <voco> token
        return {
            "questions": len(cached),
            "identical_answers": sum(a.text == b.text for a, b in zip(cached, single_pass, strict=True)),
            "max_abs_logit_diff": float(np.abs(logits_2QV[0][is_token] - logits_2QV[1][is_token]).max()),
        }

    def _write_report(
        self, result: Mapping[str, Any], items: Sequence[Item], answers: Mapping[str, Sequence[Sequence[Answer]]],
        arms: Sequence[Arm],
    ) -> None:
        seed = self.seeds[0]
        curves = {arm.name: report.loss_curve(self._run(seed, arm.stage)) for arm in arms if arm.name != LOWER}
        tokenizer = Tokenizer.from_directory(self.workdir / "tokenizer")
        write = template("bare").spans
        asked = [write((Turn("user", item.prompt), Turn("assistant", item.gold)), tokenizer.eos_token)
                 for item in items[:2]]
        sample = lay_out_sample("drawn", 1, asked, tokenizer, unit_shape(self._model("voco_1")), 1000)
        examples = [
            report.Example(Path(str(items[i].visuals[0])), items[i].prompt, items[i].gold,
                           {name: runs[0][i].text for name, runs in answers.items()})
            for i in np.linspace(0, len(items) - 1, 12).astype(int)
        ]
        versions = json.loads((self._run(seed, "voco_1") / "versions.json").read_text())
        report.write_report(self.workdir / "report.html", result, report.draw_losses(curves), report.draw_mask(sample),
                            examples, versions)

    def _model(self, stage: str) -> ModelConfig:
        return build(ModelConfig, json.loads(self.get_config(stage).model.to_json()), "model")

    def _run(self, seed: int, stage: str) -> Path:
        return self.workdir / f"seed_{seed}" / stage

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - before


def _about_first_images(items: Sequence[Item], images: int | None) -> list[Item]:
    """Returns the questions about the first images; None for all images."""
    first = set(list(dict.fromkeys(item.visuals for item in items))[:images])
    return [item for item in items if item.visuals in first]


def _score(benchmark: Benchmark, items: Sequence[Item], answers: Sequence[Answer]) -> Score:
    """Returns a run's accuracy, overall and by kind of question, in [0, 1]."""
    marks = [mark or 0.0 for mark in benchmark.score([answer.text for answer in answers], items=items).marks]
    return Score(sum(marks) / len(marks), accuracy_by_kind(marks, [item.kind for item in items]))
