"""The whole method on a small public data set: trains every stage, compresses, reads and prints what is retained."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from vocojax.data.conversation import Turn, template
from vocojax.data.sources.easy_vqa import EasyVqaSource
from vocojax.data.tokenizer import Tokenizer
from vocojax.evaluation import report
from vocojax.evaluation.benchmarks.base import Benchmark, Item
from vocojax.evaluation.benchmarks.registry import open_benchmark
from vocojax.evaluation.metrics import accuracy_by_kind
from vocojax.evaluation.retention import Score, format_table, table
from vocojax.experiments.jobs import VISION, Runs, share_compilations
from vocojax.files import write_atomically
from vocojax.inference.assistant import Assistant
from vocojax.inference.many import Way, answer_many
from vocojax.inference.requests import Answer, Request
from vocojax.layout import Visibility, lay_out_sample, unit_shape

UPPER, LOWER = "Upper Bound", "Lower Bound"
ALIGNMENT = "alignment"


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
    Arm("VoCo-2 (own rows)", "voco_2+own", "voco"),  # ours; see the last section of docs/science.md
    Arm("VoCo-8 (own rows)", "voco_8+own", "voco"),
    Arm("Avg. Pool + Linear", "avg_pool", "causal"),
    Arm("Q-Former (1 query)", "qformer", "causal"),
    Arm("LLaMA-VID (2 tokens)", "llama_vid", "causal"),
    Arm("Downsampled image (1 token)", "downsample", "causal"),
    Arm("Random (1 token)", "random", "causal"),
)


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
    """

    RESULT: ClassVar = "retention.json"
    get_config: Callable[[str], ConfigDict]
    workdir: Path
    seeds: Sequence[int] = (0,)
    full: bool = False
    steps: Mapping[str, int] = field(default_factory=dict)
    test_images: int | None = None

    def __post_init__(self) -> None:
        self._runs = Runs(self.get_config, "configs/quickstart.py", self.workdir, self.steps)

    def run(self) -> dict[str, Any]:
        """Trains, evaluates, prints the table, writes retention.json and report.html; returns the former's content."""
        share_compilations(self.workdir)
        started = time.perf_counter()
        arms = ARMS + (FURTHER_ARMS if self.full else ())
        runs, stages = self._runs, dict.fromkeys(arm.stage for arm in arms)
        runs.make_tokenizer(f"{q.text} {q.answer}" for group in EasyVqaSource("train").questions for q in group)
        runs.train([runs.vision_job(seed, VOCO_1.stage) for seed in self.seeds])
        runs.train([runs.stage_job(seed, ALIGNMENT, VISION) for seed in self.seeds])
        runs.train([runs.stage_job(seed, stage, ALIGNMENT) for seed in self.seeds for stage in stages])
        benchmark = open_benchmark("easy_vqa", self.workdir)
        items = _about_first_images(benchmark.items, self.test_images)
        requests = benchmark.requests(items)
        with runs.timed("evaluation"):
            answers = {arm.name: [self._answer(requests, arm, seed) for seed in self.seeds] for arm in arms}
        with runs.timed("two-stage check"):
            two_stage = self._check_two_stages(requests, answers[VOCO_1.name][0])
        runs.seconds["total"] = time.perf_counter() - started
        scores: dict[str, list[Score]] = {
            name: [_score(benchmark, items, own) for own in of_seeds] for name, of_seeds in answers.items()
        }
        rows = table(scores, LOWER, UPPER)
        result: dict[str, Any] = {
            "rows": rows,
            "seeds": list(self.seeds),
            "vision_tokens": runs.model(VOCO_1.stage).unit_tokens,
            "two_stage": two_stage,
            "seconds": {name: round(seconds, 1) for name, seconds in runs.seconds.items()},
        }
        write_atomically(self.workdir / self.RESULT, json.dumps(result, indent=2) + "\n")
        self._write_report(result, items, answers, arms)
        print(format_table(rows))
        return result

    def _answer(self, requests: Sequence[Request], arm: Arm, seed: int, way: Way = "single pass") -> list[Answer]:
        assistant = Assistant.from_run(self._runs.directory(seed, arm.stage), arm.visibility)
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
        runs, seed = self._runs, self.seeds[0]
        curves = {arm.name: report.loss_curve(runs.directory(seed, arm.stage)) for arm in arms if arm.name != LOWER}
        tokenizer = Tokenizer.from_directory(runs.tokenizer)
        write = template("bare").spans
        asked = [write((Turn("user", item.prompt), Turn("assistant", item.gold)), tokenizer.eos_token)
                 for item in items[:2]]
        sample = lay_out_sample("drawn", 1, asked, tokenizer, unit_shape(runs.model(VOCO_1.stage)), 1000)
        examples = [
            report.Example(Path(str(items[i].visuals[0])), items[i].prompt, items[i].gold,
                           {name: runs[0][i].text for name, runs in answers.items()})
            for i in np.linspace(0, len(items) - 1, 12).astype(int)
        ]
        versions = json.loads((runs.directory(seed, VOCO_1.stage) / "versions.json").read_text())
        report.write_report(self.workdir / "report.html", result, report.draw_losses(curves), report.draw_mask(sample),
                            examples, versions)


def _about_first_images(items: Sequence[Item], images: int | None) -> list[Item]:
    """Returns the questions about the first images; None for all images."""
    first = set(list(dict.fromkeys(item.visuals for item in items))[:images])
    return [item for item in items if item.visuals in first]


def _score(benchmark: Benchmark, items: Sequence[Item], answers: Sequence[Answer]) -> Score:
    """Returns a run's accuracy, overall and by kind of question, in [0, 1]."""
    marks = [mark or 0.0 for mark in benchmark.score([answer.text for answer in answers], items=items).marks]
    return Score(sum(marks) / len(marks), accuracy_by_kind(marks, [item.kind for item in items]))
