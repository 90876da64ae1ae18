"""A proof that time is learnt: clips of real images, questions that depend on the order of frames, four kinds of rows.

A stage for images comes before the video stage, as in the paper (§3.4). The video stage is compared with the model of
the image stage, with itself where a clip's frames are shuffled, and with the best guess from only the question's text.
"""

import collections
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from vocojax.data.sources.easy_vqa import EasyVqaSource, Question, Split
from vocojax.data.sources.easy_vqa_clips import LENGTHS, ORDERED, SHARES, Clip, EasyVqaClips, words
from vocojax.evaluation import report, video_report
from vocojax.evaluation.metrics import accuracy_by_kind, exact_match
from vocojax.evaluation.retention import percent
from vocojax.experiments.jobs import VISION, Runs, share_compilations
from vocojax.files import write_atomically
from vocojax.inference.assistant import Assistant
from vocojax.inference.decoding.sampling import SamplingConfig

ALIGNMENT = "alignment"
VOCOS = (1, 2)
TEXT_ONLY = "Text only"
SHUFFLE = 1  # seed of the shuffled order of frames
MAJORITY_CLIPS = 4000  # clips of the training split that the best guess is counted on
SHOWN_CLIPS, SHOWN_QUESTIONS = 8, 8  # in the report
ANSWER = SamplingConfig(max_new_tokens=2)  # one word and the end


@dataclass(frozen=True)
class Arm:
    """A row of the table that a model answers.

    Attributes:
      name: shown in the table.
      stage: whose run answers.
      shuffled: whether it sees a clip's frames in random order.
    """

    name: str
    stage: str
    shuffled: bool = False


def arms(vocos: Sequence[int]) -> list[Arm]:
    """Returns the rows of the table that a model answers, for each number of VoCo tokens."""
    return [arm for n in vocos for arm in (
        Arm(f"Video stage, N = {n}", f"video_{n}"),
        Arm(f"Image stage only, N = {n}", f"voco_{n}"),
        Arm(f"Shuffled frames, N = {n}", f"video_{n}", shuffled=True),
    )]


@dataclass
class VideoQuickstart:
    """The trainings and evaluations of the table about time.

    Attributes:
      get_config: returns a stage's config by its name (`configs/quickstart_video.py`).
      workdir: for runs and results; what is finished in it is not repeated.
      seeds: everything is trained once for each.
      vocos: numbers of VoCo tokens per frame; everything is trained once for each.
      steps: number of steps by stage, in place of the configs'; also of `vision`.
      split: whose clips are asked about: `test`, or `validation` to make choices on.
      clips: how many clips are asked about; None is all.
    """

    RESULT: ClassVar = "video.json"
    get_config: Callable[[str], ConfigDict]
    workdir: Path
    seeds: Sequence[int] = (0,)
    vocos: Sequence[int] = VOCOS
    steps: Mapping[str, int] = field(default_factory=dict)
    split: Split = "test"
    clips: int | None = None

    def __post_init__(self) -> None:
        self._runs = Runs(self.get_config, "configs/quickstart_video.py", self.workdir, self.steps)

    def run(self) -> dict[str, Any]:
        """Trains, evaluates, prints the table, writes video.json and report.html; returns the former's content."""
        share_compilations(self.workdir)
        started = time.perf_counter()
        self._train()
        source = EasyVqaClips(self.split)
        clips = [source.clip(index) for index in range(self.clips or len(source))]
        answers: dict[str, list[list[str]]] = {}
        for arm in arms(self.vocos):
            with self._runs.timed("evaluation"):
                answers[arm.name] = [self._answers(arm, seed, clips) for seed in self.seeds]
        with self._runs.timed("text only"):
            guess = majority(EasyVqaClips("train"), MAJORITY_CLIPS)
            answers[TEXT_ONLY] = [[guess(question) for clip in clips for question in clip.questions]]
        self._runs.seconds["total"] = time.perf_counter() - started
        rows = {name: table_row(clips, of_seeds) for name, of_seeds in answers.items()}
        result = {
            "rows": rows,
            "frames": list(LENGTHS),
            "seeds": list(self.seeds),
            "vocos": list(self.vocos),
            "ordered_types": list(ORDERED),
            "split": self.split,
            "questions": sum(len(clip.questions) for clip in clips),
            "seconds": {name: round(seconds, 1) for name, seconds in self._runs.seconds.items()},
        }
        write_atomically(self.workdir / self.RESULT, json.dumps(result, indent=2) + "\n")
        self._write_report(result, clips, answers)
        print(format_table(rows))
        return result

    def _train(self) -> None:
        """Trains all stages of all seeds."""
        runs = self._runs
        questions = (f"{q.text} {q.answer}" for group in EasyVqaSource("train").questions for q in group)
        runs.make_tokenizer([words(), *questions])
        runs.train([runs.vision_job(seed, ALIGNMENT) for seed in self.seeds])
        runs.train([runs.stage_job(seed, ALIGNMENT, VISION) for seed in self.seeds])
        runs.train([runs.stage_job(seed, f"voco_{n}", ALIGNMENT) for seed in self.seeds for n in self.vocos])
        runs.train([runs.stage_job(seed, f"short_{n}", f"voco_{n}") for seed in self.seeds for n in self.vocos])
        runs.train([runs.stage_job(seed, f"video_{n}", f"short_{n}") for seed in self.seeds for n in self.vocos])

    def _answers(self, arm: Arm, seed: int, clips: Sequence[Clip]) -> list[str]:
        """Returns an arm's answers; those that are in the run's directory already are not asked for again."""
        run = self._runs.directory(seed, arm.stage)
        path = run / f"answers_{self.split}_{len(clips)}{'_shuffled' if arm.shuffled else ''}.json"
        if path.is_file():
            return json.loads(path.read_text())
        answers = answer_clips(Assistant.from_run(run), clips, arm.shuffled)
        write_atomically(path, json.dumps(answers) + "\n")
        return answers

    def _write_report(
        self, result: Mapping[str, Any], clips: Sequence[Clip], answers: Mapping[str, Sequence[Sequence[str]]]
    ) -> None:
        runs, seed = self._runs, self.seeds[0]
        losses = {stage: report.loss_curve(runs.directory(seed, stage))
                  for n in self.vocos for stage in (f"voco_{n}", f"short_{n}", f"video_{n}")}
        strips, first = [], 0
        for number, clip in enumerate(clips):
            asked = range(first, first + len(clip.questions))
            first = asked.stop
            if number < SHOWN_CLIPS:
                shown = [(question, {name: of_seeds[0][at] for name, of_seeds in answers.items()})
                         for at, question in zip(asked, clip.questions, strict=True)]
                strips.append(video_report.Strip(clip.images, shown[:SHOWN_QUESTIONS]))
        versions = json.loads((runs.directory(seed, f"video_{self.vocos[0]}") / "versions.json").read_text())
        video_report.write_report(self.workdir / "report.html", result, losses, strips, versions)


def answer_clips(
    assistant: Assistant, clips: Sequence[Clip], shuffled: bool = False, batch_size: int = 256
) -> list[str]:
    """Answers all questions about clips. Every image is compressed once, however many clips show it.

    Args:
      assistant: answers.
      clips: with their questions.
      shuffled: whether the model sees each clip's frames in random order, the same for all of its questions.
      batch_size: questions that are answered at once.

    Returns:
      The answers, clip by clip.
    """
    images = list(dict.fromkeys(path for clip in clips for path in clip.images))
    number = {path: index for index, path in enumerate(images)}
    cache = assistant.compress(images)
    random = np.random.default_rng(SHUFFLE)
    asked: list[tuple[str, list[int]]] = []
    for clip in clips:
        units = [number[path] for path in clip.images]
        if shuffled:
            units = random.permutation(units).tolist()
        asked += [(question.text, units) for question in clip.questions]
    answers = [""] * len(asked)
    by_length = sorted(range(len(asked)), key=lambda index: len(asked[index][1]))  # few programs, little padding
    for first in range(0, len(asked), batch_size):
        batch = by_length[first : first + batch_size]
        questions, about = [asked[index][0] for index in batch], [asked[index][1] for index in batch]
        for index, text in zip(batch, assistant.read(cache, questions, about, ANSWER), strict=True):
            answers[index] = text
    return answers


def majority(source: EasyVqaClips, count: int) -> Callable[[Question], str]:
    """Returns the best guess without a clip: the most frequent answer to a question's text, or else to its kind.

    Args:
      source: the training split.
      count: how many of its clips are counted.
    """
    by_text: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    by_kind: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for index in range(count):
        for question in source.clip(index).questions:
            by_text[question.text][question.answer] += 1
            by_kind[question.kind][question.answer] += 1

    def guess(question: Question) -> str:
        counts = by_text.get(question.text) or by_kind[question.kind]
        return min(counts, key=lambda answer: (-counts[answer], answer))

    return guess


def table_row(clips: Sequence[Clip], of_seeds: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Returns a row of the table: means over seeds, and what they are means of.

    Args:
      clips: with their questions.
      of_seeds: the answers of each seed, clip by clip.
    """
    per_seed = [_scores(clips, answers) for answers in of_seeds]
    return {**_combined(per_seed, np.mean), "spread": _combined(per_seed, np.ptp), "per_seed": per_seed}


def _scores(clips: Sequence[Clip], answers: Sequence[str]) -> dict[str, Any]:
    """Returns accuracies overall, by type of question, and both for each number of frames."""
    asked = [(len(clip.images), question) for clip in clips for question in clip.questions]
    marks = [float(exact_match(answer, question.answer)) for answer, (_, question) in zip(answers, asked, strict=True)]

    def scores(chosen: Iterable[int]) -> dict[str, Any]:
        chosen = list(chosen)
        of_kind = accuracy_by_kind([marks[i] for i in chosen], [asked[i][1].kind for i in chosen])
        return {"accuracy": float(np.mean([marks[i] for i in chosen])),
                "by_type": {kind: of_kind[kind] for kind in SHARES if kind in of_kind}}

    lengths = sorted({length for length, _ in asked})
    return scores(range(len(asked))) | {"by_frames": {
        str(length): scores(i for i, (own, _) in enumerate(asked) if own == length) for length in lengths}}


def _combined(values: Sequence[Any], how: Callable[[Sequence[float]], Any]) -> Any:
    """Combines the numbers at the same place of equal trees of dicts."""
    if isinstance(values[0], Mapping):
        return {key: _combined([value[key] for value in values], how) for key in values[0]}
    return float(how(values))


def format_table(rows: Mapping[str, Any]) -> str:
    """Writes the table in Markdown, in per cent."""
    kinds = list(next(iter(rows.values()))["by_type"])
    lines = [["", "accuracy", *kinds, "frame t of 8"], ["---"] * (len(kinds) + 3)]
    for name, row in rows.items():
        figures = [row["accuracy"], *(row["by_type"][kind] for kind in kinds),
                   row["by_frames"][str(LENGTHS[0])]["by_type"].get("frame t")]
        lines.append([name, *map(percent, figures)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
