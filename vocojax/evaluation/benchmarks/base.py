"""What a benchmark is: questions about images or videos, the official answer files, and the official score.

A new benchmark is a module of this folder with a class that derives from `Benchmark`, and a line in `registry.py`.
"""

import abc
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vocojax.errors import InputError
from vocojax.evaluation.metrics import accuracy_by_kind
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.requests import Request
from vocojax.inference.visuals import VisualSource

OFFICIAL, LMMS_EVAL = "official", "lmms-eval"
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Item:
    """A question of a benchmark.

    Attributes:
      id: unique within the benchmark; ids that are numbers in the official files are written in decimal.
      prompt: the user's turn, after the visuals; `Benchmark.prompt` completes it where a box or point belongs in it.
      visuals: what the question is about, in order; `Benchmark.visual` turns each into what is read.
      gold: the correct answer in the benchmark's own form; None where labels are hidden.
      kind: the group that scores are broken down by; "" for none.
      record: the annotation's record.
    """

    id: str
    prompt: str
    visuals: tuple[VisualSource, ...]
    gold: Any = None
    kind: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Missing:
    """The treatment of questions without an answer.

    Attributes:
      counted: True if they count as wrong, False if they leave the denominator.
      officially: what the official tool does, in words.
    """

    counted: bool
    officially: str


@dataclass(frozen=True)
class Result:
    """A benchmark's score.

    Attributes:
      benchmark: its name.
      convention: the definition it was scored by.
      metrics: figures by name, the one that papers report first. Shares are percentages; points are as official.
      by_kind: the reported figure of each group of questions.
      questions: how many count.
      missing: how many have no answer.
      unreadable: answers in which the benchmark's reader found nothing; see `Benchmark.counts_unreadable`.
      notes: what a reader of the figure must know.
      marks: of every question, in order; None for one that does not count.
    """

    benchmark: str
    convention: str
    metrics: Mapping[str, float]
    by_kind: Mapping[str, float]
    questions: int
    missing: int
    unreadable: int
    notes: tuple[str, ...]
    marks: tuple[float | None, ...]

    @property
    def value(self) -> float:
        """The figure that papers report."""
        return next(iter(self.metrics.values()))

    def __str__(self) -> str:
        """Returns the score in a few lines, for a terminal."""
        first, *others = self.metrics.items()
        counts = [f"{self.questions:,} questions", *([f"{self.missing:,} without an answer"] if self.missing else []),
                  *([f"{self.unreadable:,} unreadable"] if self.unreadable else [])]
        lines = [f"{self.benchmark}: {first[0]} {first[1]:.2f} ({self.convention}; {', '.join(counts)})"]
        lines += [f"  {name} {value:.2f}" for name, value in (*others, *self.by_kind.items())]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def as_json(self) -> dict[str, Any]:
        """Returns what a result file holds: everything but the marks."""
        return {
            "benchmark": self.benchmark, "convention": self.convention, "metric": next(iter(self.metrics)),
            "value": self.value, "metrics": dict(self.metrics), "by_kind": dict(self.by_kind),
            "questions": self.questions, "missing": self.missing, "unreadable": self.unreadable,
            "notes": list(self.notes),
        }


class Benchmark(abc.ABC):
    """Questions with their visuals, the rule that scores answers, and the form of official answer files.

    `evaluation.running` answers `items`; `evaluation.predictions` reads a file of answers; both score with `score`.

    Attributes:
      name: as in the registry.
      items: the questions, in the order of the official file.
      sampling: how answers are generated.
      conventions: definitions of the score that are available; the first is the default.
      missing: what becomes of questions without an answer.
      counts_unreadable: True if an answer in which nothing can be read is wrong, False if it leaves the denominator.
      id_fields: names under which a record of an answer holds the question's id; the first that is there counts.
      text_fields: names under which it holds the answer. One name counts for a whole file, the first that is there:
        in many official files `answer` is the gold answer beside the answer to be scored.
      unscored_ids: of questions of the official files that do not belong to `items`; answers to them are passed over.
      notes: of every result.
    """

    name: str
    sampling: ClassVar[SamplingConfig] = SamplingConfig(max_new_tokens=128)
    conventions: ClassVar[tuple[str, ...]] = (OFFICIAL,)
    missing: ClassVar[Missing] = Missing(True, "stops at the first one")
    counts_unreadable: ClassVar[bool] = True
    id_fields: ClassVar[tuple[str, ...]] = ("question_id", "id")
    text_fields: ClassVar[tuple[str, ...]] = ("text", "answer")
    unscored_ids: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @functools.cached_property
    @abc.abstractmethod
    def items(self) -> Sequence[Item]:
        """The questions."""

    @abc.abstractmethod
    def mark(self, item: Item, text: str, convention: str) -> float | None:
        """Returns the mark of an answer, 0 to 1; None if the benchmark's reader finds nothing in it (counts 0)."""

    def metrics(
        self, items: Sequence[Item], texts: Sequence[str | None], marks: Sequence[float], convention: str
    ) -> Mapping[str, float]:
        """Returns the figures of all questions that count, the reported one first.

        Args:
          items: the questions that count.
          texts: their answers; None for a missing one that counts as wrong.
          marks: their marks, 0 for a missing or an unreadable one.
          convention: one of `conventions`.
        """
        return {"accuracy": 100 * sum(marks) / len(marks)}

    def by_kind(self, items: Sequence[Item], marks: Sequence[float]) -> Mapping[str, float]:
        """Returns the mean mark of each kind of question, in per cent."""
        if not any(item.kind for item in items):
            return {}
        return {kind: 100 * mean for kind, mean in accuracy_by_kind(marks, [item.kind for item in items]).items()}

    def identify(self, record: Mapping[str, Any]) -> str | None:
        """Returns the id of the question that a record of an answer is about; None if the record names none."""
        found = next((record[name] for name in self.id_fields if name in record), None)
        if isinstance(found, float) and found.is_integer():  # as pandas writes a column with a gap
            found = int(found)
        return str(found) if type(found) in (str, int) else None

    def locate(self, records: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """Returns the id of the question of every record of a file of answers; see `identify`."""
        return [self.identify(record) for record in records]

    def answer_of(self, value: object) -> object:
        """Returns the text of an answer as a file holds it; anything but a text is malformed."""
        return value

    def official_id(self, item: Item) -> str | int:
        """Returns a question's id as LLaVA's answer files write it."""
        return item.id

    def submission(self, texts: Mapping[str, str]) -> Mapping[str, str | bytes]:
        """Returns the files that the official tool or server takes, by name.

        LLaVA's benchmarks are scored from LLaVA's own answer file, which every run writes, and need no other.

        Args:
          texts: answers by the questions' ids.
        """
        del texts
        return {}

    def visual(self, source: VisualSource) -> VisualSource:
        """Returns what is read for a visual of an item: a file, or an image that the annotation file holds."""
        return source

    def prompt(self, item: Item) -> str:
        """Returns what a question's user turn says, as answer files state it."""
        return item.prompt

    def requests(self, items: Iterable[Item] | None = None) -> list[Request]:
        """Returns questions as requests; all of them by default."""
        return [Request(self.prompt(item), tuple(map(self.visual, item.visuals)), self.sampling)
                for item in (self.items if items is None else items)]

    def score(
        self, texts: Sequence[str | None], convention: str = OFFICIAL, items: Sequence[Item] | None = None
    ) -> Result:
        """Returns the score of answers.

        Args:
          texts: as generated, in the order of the questions; None for a question without an answer.
          convention: the definition of the score.
          items: the questions that were asked; None for all.

        Raises:
          InputError: the convention does not exist here, labels are hidden, or nothing can be scored.
        """
        if convention not in self.conventions:
            raise InputError(f"{self.name}: is not scored by the convention {convention!r}; available: "
                             f"{', '.join(self.conventions)}")
        asked = self.items if items is None else items
        if all(item.gold is None for item in asked):
            raise InputError(f"{self.name}: labels are not public, so nothing can be scored here; send the answer file "
                             "to the benchmark's server")
        pairs = list(zip(asked, texts, strict=True))
        found = [0.0 if text is None else self.mark(item, text, convention) for item, text in pairs]
        counts = [item.gold is not None and (self.missing.counted if text is None else
                                             self.counts_unreadable or mark is not None)
                  for (item, text), mark in zip(pairs, found, strict=True)]
        kept = [(item, text, mark or 0.0) for (item, text), mark, is_counted in zip(pairs, found, counts, strict=True)
                if is_counted]
        if not kept:
            raise InputError(f"{self.name}: no question that counts has an answer")
        counted, answers, marks = (list(column) for column in zip(*kept, strict=True))
        return Result(
            self.name, convention, self.metrics(counted, answers, marks, convention), self.by_kind(counted, marks),
            questions=len(kept), missing=sum(text is None for _, text in pairs),
            unreadable=sum(mark is None for mark in found),
            notes=self.notes,
            marks=tuple((mark or 0.0) if is_counted else None
                        for mark, is_counted in zip(found, counts, strict=True)),
        )
