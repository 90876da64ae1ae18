"""Writes the stored figures (`measured/*.json`) into the README's tables.

    python docs/front_page.py        writes README.md

A table of the README follows a line `<!-- measured NAME -->`. A test fails where a table is not the stored one.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).with_name("measured")
README = Path(__file__).parent.parent / "README.md"
STEPS = ("v5p:4x4x4", "minimal", "8"), ("v5e:16x16", "full", "8")  # of the 7B that the README shows
PLACE = re.compile(r"(<!-- measured (\w+) -->\n)(?:\|.*\n)*")


def stored(name: str) -> dict[str, Any]:
    """Returns a stored table: `title`, `columns`, `rows` and its origin."""
    return json.loads((MEASURED / f"{name}.json").read_text())


def figure(name: str, column: str, *row: str) -> str:
    """Returns one cell of a stored table.

    Args:
      name: of the table.
      column: its column.
      *row: the first cells of its row.
    """
    table = stored(name)
    (found,) = (cells for cells in table["rows"] if tuple(cells[: len(row)]) == row)
    return found[table["columns"].index(column)]


def quickstart() -> list[list[str]]:
    """Returns the lines of the quickstart's table, the columns first."""
    table = stored("quickstart")
    return [table["columns"], *table["rows"]]


def mosaic() -> list[list[str]]:
    """Returns the mosaics' table without the rows and columns that only the page about them discusses."""
    table = stored("mosaic")
    shown = ("Upper Bound (16 vision tokens)", "VoCo-8 + pool", "VoCo-1 + pool", "Avg. Pool + Linear", "VoCo-1",
             "Lower Bound (VoCo mask without VoCo training)")
    rows = {row[0]: row for row in table["rows"]}
    return [line[:5] for line in (table["columns"], *(rows[name] for name in shown))]


def comparisons() -> list[list[str]]:
    """Returns the table of what vocojax is compared with."""
    step = figure("torch_peer", "CPU-seconds, ours / torch's", "training step")
    ours, splash = figure("kernels", "v5e ours / splash", "8 packed rows of 2,048").removesuffix(" ms").split(" / ")
    ratio = figure("data", "", "ratio of the two")
    rates, shares = (" / ".join(figure("steps", column, *setting) for setting in STEPS)
                     for column in ("tokens/s/chip", "MFU bound"))
    return [
        ["", "reference", "result"],
        *stored("agreement")["rows"],
        *stored("torch_agreement")["rows"],
        ["CPU-seconds of a training step, 58 M parameters", "transformers + torch", f"{step} of theirs"],
        ["images to packed batches", "transformers' processor in a torch `DataLoader`", f"{ratio} times the rate"],
        ["attention on packed rows, v5e, compiler's estimate", "JAX's splash attention",
         f"{ours} ms against {splash} ms"],
        ["a 7B's training step on v5p / v5e, compiler's estimate", "the chip's peak",
         f"{shares} (MFU), {rates} tokens/s per chip"],
    ]


TABLES: dict[str, Callable[[], list[list[str]]]] = {
    "quickstart": quickstart, "mosaic": mosaic, "comparisons": comparisons}


def with_stored_tables(text: str) -> str:
    """Returns the README's text with every table as it is stored."""

    def written(place: re.Match[str]) -> str:
        columns, *rows = TABLES[place[2]]()
        lines = ["| " + " | ".join(line) + " |" for line in (columns, *rows)]
        return "\n".join([place[1].rstrip("\n"), lines[0], "|" + "---|" * len(columns), *lines[1:], ""])

    return PLACE.sub(written, text)


if __name__ == "__main__":
    README.write_text(with_stored_tables(README.read_text()))
