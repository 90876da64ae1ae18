"""Tables of questions: tab-separated and comma-separated files, and which cells count as empty."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from vocojax.errors import InputError

# Cells that pandas reads as missing. The official tools read with pandas, so an option "None" is no option there.
EMPTY = frozenset(("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
                   "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"))
LARGEST_CELL = 2**31 - 1  # an image in base64 is one cell


def read_table(path: Path, content: str, delimiter: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """Reads a table with a header.

    Args:
      path: of the file, for errors.
      content: of the file.
      delimiter: between cells.
      columns: those that must be there.

    Raises:
      InputError: a column is missing, or a row has other cells than the header.
    """
    usual = csv.field_size_limit(LARGEST_CELL)  # of the whole process: other readers want theirs back
    try:
        return _rows(path, content, delimiter, columns)
    finally:
        csv.field_size_limit(usual)


def _rows(path: Path, content: str, delimiter: str, columns: Sequence[str]) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(content.removeprefix("\ufeff"), newline=""), delimiter=delimiter)
    absent = [column for column in columns if column not in (reader.fieldnames or ())]
    if absent:
        raise InputError(f"{path}: has no column {', '.join(map(repr, absent))}; it has {reader.fieldnames}")
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise InputError(f"{path}, line {reader.line_num}: has other cells than the header")
        rows.append(row)
    return rows


def filled(row: Mapping[str, str], column: str) -> str | None:
    """Returns a cell's text, or None if the column is absent or the cell is empty as pandas reads it."""
    cell = row.get(column)
    return None if cell is None or cell in EMPTY else cell
