"""Retention: how much of the vision tokens' benefit is left after compression, in the two definitions in use.

    retention = (accuracy - lower bound) / (upper bound - lower bound)      the paper's (§4.2)
    share of the upper bound = accuracy / upper bound                       other papers'

The paper's Table 1 (N = 1) has a mean of 83.7 % by the first and of 93.4 % by the second.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict


def retention(accuracy: float, lower: float, upper: float) -> float | None:
    """Returns the share of the gap between the bounds that is kept; None where the bounds are equal."""
    return (accuracy - lower) / (upper - lower) if upper != lower else None


def share_of_upper(accuracy: float, upper: float) -> float | None:
    """Returns the share of the upper bound that is reached; None where that is 0."""
    return accuracy / upper if upper else None


@dataclass(frozen=True)
class MeanRetention:
    """Retention over several benchmarks.

    Attributes:
      retention: of each benchmark, by the paper's definition.
      of_upper: of each benchmark, as the share of the upper bound.
      mean_retention: the mean of the former; None if it is undefined for one.
      mean_of_upper: the mean of the latter; None if it is undefined for one.
    """

    retention: Mapping[str, float | None]
    of_upper: Mapping[str, float | None]
    mean_retention: float | None
    mean_of_upper: float | None


def mean_retention(
    values: Mapping[str, float | None], lower: Mapping[str, float | None], upper: Mapping[str, float | None]
) -> MeanRetention:
    """Returns a model's retention on several benchmarks, and the means over them.

    Args:
      values: its figure on each benchmark, in any unit; None for one that is not known.
      lower: the lower bound's, for the same benchmarks.
      upper: the upper bound's, for the same benchmarks.
    """
    kept: dict[str, float | None] = {}
    shares: dict[str, float | None] = {}
    for name, value in values.items():
        low, high = lower[name], upper[name]
        shares[name] = None if value is None or high is None else share_of_upper(value, high)
        kept[name] = None if value is None or low is None or high is None else retention(value, low, high)
    return MeanRetention(kept, shares, _mean(kept.values()), _mean(shares.values()))


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = list(values)
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known and len(known) == len(numbers) else None


class Row(TypedDict):
    """A row of the table: means over seeds.

    Attributes:
      accuracy: in [0, 1].
      accuracy_by_question_type: in [0, 1] each.
      retention: None where the bounds of some seed are equal.
    """

    accuracy: float
    accuracy_by_question_type: dict[str, float]
    retention: float | None


@dataclass(frozen=True)
class Score:
    """Accuracy of one model.

    Attributes:
      accuracy: over all questions, in [0, 1].
      by_kind: of each kind of question, in [0, 1].
    """

    accuracy: float
    by_kind: Mapping[str, float] = field(default_factory=dict)


def mean_score(scores: Sequence[Score]) -> Score:
    """Returns the mean of one model's scores over seeds."""
    kinds = scores[0].by_kind
    mean = lambda values: sum(values) / len(scores)
    return Score(mean([s.accuracy for s in scores]), {k: mean([s.by_kind[k] for s in scores]) for k in kinds})


def table(scores: Mapping[str, Sequence[Score]], lower: str, upper: str) -> dict[str, Row]:
    """Makes the retention table.

    Args:
      scores: for every model its scores over the seeds, in the same order of seeds.
      lower: name of the lower bound.
      upper: name of the upper bound.

    Returns:
      For every model the mean accuracy, overall and by question type, and the mean over seeds of its retention.
    """
    rows: dict[str, Row] = {}
    for name, runs in scores.items():
        mean = mean_score(runs)
        kept = [retention(s.accuracy, low.accuracy, up.accuracy)
                for s, low, up in zip(runs, scores[lower], scores[upper], strict=True)]
        rows[name] = {
            "accuracy": mean.accuracy,
            "accuracy_by_question_type": dict(mean.by_kind),
            "retention": None if None in kept else sum(k for k in kept if k is not None) / len(kept),
        }
    return rows


def percent(share: float | None) -> str:
    """Writes a share as a percentage: 0.5 as '50.0 %'."""
    return "n/a" if share is None else f"{100 * share:.1f} %"


def format_table(rows: Mapping[str, Row]) -> str:
    """Writes the table for a terminal, in per cent."""
    kinds = list(next(iter(rows.values()))["accuracy_by_question_type"])
    header = ["model", "accuracy", *kinds, "retention"]
    lines = [header]
    for name, row in rows.items():
        figures = [row["accuracy"], *(row["accuracy_by_question_type"][kind] for kind in kinds), row["retention"]]
        lines.append([name, *map(percent, figures)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def aligned(line: list[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *cells[1:]])

    return "\n".join([aligned(header), "  ".join("-" * width for width in widths), *map(aligned, lines[1:])])
