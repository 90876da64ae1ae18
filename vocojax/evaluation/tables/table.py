"""A table of several models' figures, with what each keeps of the upper bound's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vocojax.errors import InputError
from vocojax.evaluation.retention import MeanRetention, mean_retention
from vocojax.evaluation.tables.layouts import Column, Layout
from vocojax.evaluation.tables.rows import LOWER, UPPER


@dataclass(frozen=True)
class Row:
    """A model's figures.

    Attributes:
      name: shown in the table.
      figures: by the columns' titles; what is not there is unknown.
      tokens: of one image that text reads; None where it is unknown.
      checkpoint: the weights' directory; '' for figures that were given.
      problems: why figures are missing, by the benchmark's name.
    """

    name: str
    figures: Mapping[str, float]
    tokens: int | None = None
    checkpoint: str = ""
    problems: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Table:
    """A table with its figures. Rows named `rows.UPPER` and `rows.LOWER` are the bounds.

    Attributes:
      layout: its columns.
      rows: from top to bottom.
      notes: what a reader must know.
      conventions: the definition that each benchmark was scored by; one that has only given figures has none.
    """

    layout: Layout
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    conventions: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that are shown: all but optional ones that no row has a figure for."""
        return tuple(column for column in self.layout.columns if not column.is_optional or self._is_known(column))

    @property
    def in_mean(self) -> tuple[Column, ...]:
        """The columns that the means are taken over: those that are not optional and that some row has a figure for."""
        return tuple(column for column in self.layout.columns if not column.is_optional and self._is_known(column))

    @property
    def has_bounds(self) -> bool:
        """True if there is an upper bound, so that retention means something."""
        return UPPER in {row.name for row in self.rows}

    @property
    def remarks(self) -> tuple[str, ...]:
        """The conventions, the notes, what the means leave out, and why figures are missing."""
        by_convention: dict[str, list[str]] = {}
        for name, convention in self.conventions.items():
            by_convention.setdefault(convention, []).append(name)
        scored = tuple(f"convention {convention}: {', '.join(names)}" for convention, names in by_convention.items())
        unknown = [column.title for column in self.layout.columns if not column.is_optional and column
                   not in self.in_mean]
        left_out = (f"no row has a figure for {', '.join(unknown)}; the means are over the other "
                    f"{len(self.in_mean)} columns",) if unknown and self.in_mean else ()
        failed = tuple(f"{row.name} failed on {name}: {problem}" for row in self.rows for name, problem in row.problems)
        return (*scored, *self.notes, *left_out, *failed)

    def retention(self, row: Row) -> MeanRetention:
        """Returns a row's retention in both definitions, by the columns' titles, with the means over `in_mean`."""
        figures = {each.name: each.figures for each in self.rows}
        titles = [column.title for column in self.in_mean]
        of = lambda values: {title: values.get(title) for title in titles}
        return mean_retention(of(row.figures), of(figures.get(LOWER, {})), of(figures.get(UPPER, {})))

    def as_json(self) -> dict[str, Any]:
        """Returns what the table's JSON file holds."""
        return {
            "table": self.layout.name, "caption": self.layout.caption,
            "columns": [{"title": column.title, "benchmark": column.benchmark, "metric": column.metric,
                         "convention": self.conventions.get(column.benchmark, "")} for column in self.columns],
            "rows": [self._row_as_json(row) for row in self.rows],
            "notes": list(self.remarks),
        }

    def _row_as_json(self, row: Row) -> dict[str, Any]:
        kept = self.retention(row) if self.has_bounds else None
        return {
            "name": row.name, "checkpoint": row.checkpoint, "tokens": row.tokens, "figures": dict(row.figures),
            "retention": dict(kept.retention) if kept else {}, "of_upper": dict(kept.of_upper) if kept else {},
            "mean_retention": kept and kept.mean_retention, "mean_of_upper": kept and kept.mean_of_upper,
            "problems": dict(row.problems),
        }

    def _is_known(self, column: Column) -> bool:
        return any(column.title in row.figures for row in self.rows)


def with_given(
    rows: Sequence[Row], layout: Layout, given: Mapping[str, Mapping[str, Any]], source: str
) -> tuple[Row, ...]:
    """Returns rows with figures that come from elsewhere: a benchmark's server, or a paper.

    Args:
      rows: of the table.
      layout: of the table.
      given: figures by row and by benchmark; a row may state its `tokens`. A row that is not among `rows` becomes one.
      source: the file's name, for errors.

    Raises:
      InputError: a benchmark is not in the table, or a figure is no number.
    """
    titles = {column.benchmark: column.title for column in layout.columns if not column.metric}
    found = {row.name: row for row in rows}
    for name, figures in given.items():
        if not isinstance(figures, Mapping):
            raise InputError(f'{source}: must be {{"ROW": {{"BENCHMARK": figure}}}}, but {name!r} is no object')
        row = found.get(name, Row(name, {}))
        for key, value in figures.items():
            if key not in (*titles, "tokens"):
                raise InputError(f"{source}: {name!r} has a figure for {key!r}, which is not in {layout.name} "
                                 f"({', '.join(titles)})")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"{source}: {name!r} must have a number for {key!r}, got {value!r}")
        scores = {titles[key]: float(value) for key, value in figures.items() if key != "tokens"}
        problems = tuple(each for each in row.problems if each[0] not in figures)
        tokens = int(figures["tokens"]) if "tokens" in figures else row.tokens
        found[name] = replace(row, figures={**row.figures, **scores}, tokens=tokens, problems=problems)
    last = [found.pop(LOWER)] if LOWER in found else []
    first = [found.pop(UPPER)] if UPPER in found else []
    return (*first, *found.values(), *last)
