"""A table's page: the figures, and the questions on which its rows differ most, with their pictures.

One self-contained HTML file. Pictures are made small and lie in the file.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vocojax.errors import VocojaxError
from vocojax.evaluation.benchmarks.base import Benchmark, Item
from vocojax.evaluation.tables.rows import LOWER, UPPER
from vocojax.evaluation.tables.table import Table
from vocojax.evaluation.tables.writing import lines_of
from vocojax.files import write_atomically
from vocojax.inference.visuals import VisualSource, prepare_visual

EXAMPLES = 6  # of each kind and benchmark
PICTURE = 160  # edge of a picture, in pixels
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #dde2ea; vertical-align: top; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
.text td { max-width: 18rem; overflow-wrap: anywhere; white-space: pre-wrap; } .share td { color: #5a6475; }
.right { color: #11703c; } .wrong { color: #b3261e; } .note { color: #5a6475; }
"""


@dataclass(frozen=True)
class Answered:
    """A benchmark's questions with the answers of a table's rows.

    Attributes:
      benchmark: was asked.
      items: the questions that were asked.
      texts: by the row's name, its answers in the order of `items`.
      marks: by the row's name, their marks in [0, 1]; None for one that does not count.
    """

    benchmark: Benchmark
    items: Sequence[Item]
    texts: Mapping[str, Sequence[str]]
    marks: Mapping[str, Sequence[float | None]]


def worst_and_best(answered: Answered, count: int = EXAMPLES) -> tuple[list[int], list[int]]:
    """Returns the numbers of the questions that compression cost most, and of those that it did best on.

    A question's gain is the mean mark of the compressed rows minus the upper bound's, where that is there. Without a
    compressed row all rows count. The first of equal questions comes first, and no visual is shown twice in a list.

    Args:
      answered: the questions.
      count: how many of each, at most; the worst have a negative gain or, without an upper bound, wrong answers.
    """
    marks = answered.marks
    compared = [name for name in marks if name not in (UPPER, LOWER)] or list(marks)
    gains: dict[int, float] = {}
    for place in range(len(answered.items)):
        own = {name: each[place] for name, each in marks.items()}
        found = [mark for name in compared if (mark := own[name]) is not None]
        if found:
            base = own.get(UPPER) if UPPER in own and UPPER not in compared else None
            gains[place] = sum(found) / len(found) - (base if base is not None else 0.0)
    has_upper = UPPER in marks and UPPER not in compared
    is_bad = lambda gain: gain < 0 if has_upper else gain < 1
    worst = sorted((place for place, gain in gains.items() if is_bad(gain)), key=lambda place: gains[place])
    best = sorted((place for place, gain in gains.items() if not is_bad(gain)), key=lambda place: -gains[place])
    return _different(answered.items, worst, count), _different(answered.items, best, count)


def write_page(path: str | Path, table: Table, answered: Sequence[Answered]) -> None:
    """Writes the page.

    Args:
      path: of the file.
      table: with its figures.
      answered: the benchmarks whose answers are at hand.
    """
    title = html.escape(f"{table.layout.name}: {table.layout.caption}")
    body = [f"<h1>{title}</h1>", _figures(table), *(f"<p class=note>{html.escape(each)}</p>" for each in table.remarks)]
    for each in answered:
        worst, best = worst_and_best(each)
        for heading, places in (("worst", worst), ("best", best)):
            if places:
                body += [f"<h2>{html.escape(each.benchmark.name)}: {heading} examples</h2>", _examples(each, places)]
    write_atomically(path, "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
                     f"content='width=device-width'><title>{title}</title><style>{STYLE}</style>"
                     f"<body>{''.join(body)}</body></html>\n")


def _different(items: Sequence[Item], places: Sequence[int], count: int) -> list[int]:
    """Returns the first places whose visuals differ."""
    by_visuals: dict[Any, int] = {}
    for place in places:
        by_visuals.setdefault(items[place].visuals or place, place)
    return list(by_visuals.values())[:count]


def _figures(table: Table) -> str:
    head, *lines = lines_of(table)
    rows = [f"<tr{' class=share' if table.has_bounds and number % 3 else ''}>{_cells('td', line)}"
            for number, line in enumerate(lines)]
    return f"<table><tr>{_cells('th', head)}{''.join(rows)}</table>"


def _examples(answered: Answered, places: Sequence[int]) -> str:
    lines = []
    for place in places:
        item = answered.items[place]
        cells = []
        for name, texts in answered.texts.items():
            mark = answered.marks[name][place]
            colour = "note" if mark is None else "right" if mark >= 0.5 else "wrong"
            cells.append(f"<td class={colour}>{html.escape(texts[place]) or '(nothing)'}")
        lines.append(f"<tr><td>{_pictures(answered.benchmark, item)}<td>{html.escape(answered.benchmark.prompt(item))}"
                     f"<td>{html.escape(shown_gold(item.gold))}{''.join(cells)}")
    return f"<table class=text><tr>{_cells('th', ['', 'question', 'gold', *answered.texts])}{''.join(lines)}</table>"


def _cells(kind: str, line: Sequence[str]) -> str:
    return "".join(f"<{kind}>{html.escape(cell)}" for cell in line)


def _pictures(benchmark: Benchmark, item: Item) -> str:
    """Returns the first unit of each visual as an inline picture."""
    found = []
    for source in item.visuals:
        pixels_HWC = first_picture(benchmark.visual(source))
        if pixels_HWC is None:
            found.append("(can't be read)")
            continue
        buffer = io.BytesIO()
        Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=85)
        content = base64.b64encode(buffer.getvalue()).decode()
        found.append(f"<img alt='{html.escape(item.id, quote=True)}' src='data:image/jpeg;base64,{content}'>")
    return "".join(found)


def first_picture(source: VisualSource) -> np.ndarray | None:
    """Returns the first unit of a visual, small, uint8 RGB [PICTURE, PICTURE, 3]; None if it can't be read."""
    try:
        return prepare_visual(source, PICTURE, "pad_white").units[0]
    except (VocojaxError, OSError):
        return None


def shown_gold(gold: Any) -> str:
    """Returns a benchmark's gold answer as text; of several annotators' answers each different one once."""
    if isinstance(gold, dict) and "answers" in gold:
        return shown_gold(gold["answers"])
    if isinstance(gold, list | tuple) and not all(isinstance(each, int | float) for each in gold):
        texts = [str(each["answer"]) if isinstance(each, dict) and "answer" in each else str(each) for each in gold]
        return " / ".join(dict.fromkeys(texts))
    return "" if gold is None else str(gold)
