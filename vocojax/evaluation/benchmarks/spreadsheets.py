"""Excel files, which MMBench's server takes and VLMEvalKit writes; they need the extra `benchmarks`."""

import importlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from vocojax.errors import InputError, MissingPackage


def spreadsheet(columns: Sequence[str], rows: Sequence[Sequence[str | int]]) -> bytes:
    """Returns an Excel file with a header and one sheet."""
    book = _openpyxl().Workbook(write_only=True)
    sheet = book.create_sheet()
    for row in (columns, *rows):
        sheet.append(list(row))
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def read_spreadsheet(path: Path) -> list[dict[str, str]]:
    """Reads the first sheet of an Excel file: a record per row, by the header's names; numbers become text."""
    try:
        book = _openpyxl().load_workbook(path, read_only=True, data_only=True)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: is no Excel file: {error}") from error
    header, *rows = list(book.worksheets[0].iter_rows(values_only=True)) or [()]
    text = lambda cell: "" if cell is None else str(cell)
    return [dict(zip(map(text, header), map(text, row), strict=True)) for row in rows if any(row)]


def _openpyxl() -> ModuleType:
    try:
        return importlib.import_module("openpyxl")
    except ImportError as error:
        raise MissingPackage("Excel files need the package openpyxl: pip install -e '.[benchmarks]'") from error
