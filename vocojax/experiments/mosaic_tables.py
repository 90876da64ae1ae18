"""The tables of the mosaics: every seed, the mean and the spread, and retention in both definitions."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from vocojax.evaluation.retention import Score, percent, retention, share_of_upper

UPPER, LOWER = "Upper Bound", "Lower Bound"


class SeedRow(TypedDict):
    """A row of a table; every list has an entry per seed.

    Attributes:
      accuracy: in [0, 1].
      by_type: the accuracy of each type of question.
      retention: (accuracy - lower) / (upper - lower); None where the bounds are equal.
      of_upper: accuracy / upper.
    """

    accuracy: list[float]
    by_type: dict[str, list[float]]
    retention: list[float | None]
    of_upper: list[float | None]


def rows_by_seed(scores: Mapping[str, Sequence[Score]]) -> dict[str, SeedRow]:
    """Returns a row for every model.

    Args:
      scores: of every model over the seeds, in the same order; the bounds are among them.
    """
    lower, upper = ([score.accuracy for score in scores[name]] for name in (LOWER, UPPER))
    return {
        name: {
            "accuracy": [score.accuracy for score in of_seeds],
            "by_type": {kind: [score.by_kind[kind] for score in of_seeds] for kind in of_seeds[0].by_kind},
            "retention": [retention(score.accuracy, *bounds)
                          for score, *bounds in zip(of_seeds, lower, upper, strict=True)],
            "of_upper": [share_of_upper(score.accuracy, bound)
                         for score, bound in zip(of_seeds, upper, strict=True)],
        }
        for name, of_seeds in scores.items()
    }


def mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean over seeds; None if it is undefined for one."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def format_tables(result: Mapping[str, Any]) -> str:
    """Writes the tables of tables.json for a terminal, in per cent."""
    parts = [f"{result['questions']:,} questions of the {result['split']} split; {result['bits_per_image']:.1f} bits, "
             f"{result['vision_tokens']} vision tokens per image", _format(result["rows"])]
    if result["table_4"]:
        parts += ["Trained with 8 VoCo tokens, read with fewer:", _format(result["table_4"])]
    return "\n\n".join(parts)


def _format(rows: Mapping[str, SeedRow]) -> str:
    kinds = list(next(iter(rows.values()))["by_type"])
    lines = [["model", "accuracy", "spread", "each seed", *kinds, "retention", "of upper"]]
    for name, row in rows.items():
        each = " ".join(f"{100 * value:.1f}" for value in row["accuracy"])
        lines.append([name, percent(mean(row["accuracy"])), percent(statistics.pstdev(row["accuracy"])), each,
                      *(percent(mean(row["by_type"][kind])) for kind in kinds),
                      percent(mean(row["retention"])), percent(mean(row["of_upper"]))])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                               zip(line[1:], widths[1:], strict=True))]) for line in lines)
