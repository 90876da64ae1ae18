"""Reading of official annotation files: where they lie, and errors that name the file, the record and the field."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vocojax.errors import InputError
from vocojax.files import parse_json


def find(root: str | Path, folder: str, *names: str) -> Path:
    """Returns an annotation file: `ROOT/FOLDER/NAME`, or `ROOT/NAME` where the root is the benchmark's own folder.

    Args:
      root: of all data.
      folder: the benchmark's.
      names: of the file; the first that is there counts.

    Raises:
      InputError: none is there.
    """
    found = find_optional(root, folder, *names)
    if found is None:
        raise InputError(f"{Path(root) / folder / names[0]}: is missing; put the official file there, or set "
                         "--data_root to the directory that holds it")
    return found


def find_optional(root: str | Path, folder: str, *names: str) -> Path | None:
    """Returns an annotation file or folder as `find` does; None if there is none."""
    paths = [Path(root) / folder / name for name in names] + [Path(root) / name for name in names]
    return next((path for path in paths if path.exists()), None)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      InputError: it is no JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path}: is no JSON in UTF-8: {error}") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of one JSON object per line.

    Raises:
      InputError: names the line that is none.
    """
    return [record for _, record in numbered_json_lines(path, path.read_bytes())]


def numbered_json_lines(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a content with one JSON object per line; see `read_json_lines`."""
    lines = decoded(path, content).split("\n")  # splitlines would also split inside JSON strings
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: must be a JSON object, got {type(record).__name__}")
        yield number, record


def decoded(path: Path, content: bytes) -> str:
    """Returns a file's content as text, without a byte order mark.

    Raises:
      InputError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: must be UTF-8: {error}") from error


def listed(path: Path, content: Any, key: str | None = None) -> list[Mapping[str, Any]]:
    """Returns the list of records that a JSON file holds, or holds under a key.

    Raises:
      InputError: it holds none.
    """
    records = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records) or not records:
        where = f"under {key!r} " if key else ""
        raise InputError(f"{path}: must hold {where}a list of records; is it another file of the benchmark?")
    return records


def need(record: Mapping[str, Any], path: Path, number: int, **fields: type | tuple[type, ...]) -> None:
    """Checks that a record has fields of these types.

    Args:
      record: of an annotation file.
      path: the file.
      number: of the record in the file, from 0.
      fields: types by the fields' names.

    Raises:
      InputError: names the file, the record and the field.
    """
    for name, kinds in fields.items():
        if name not in record:
            raise InputError(f"{path}, record {number}: has no {name!r}; is it another file of the benchmark?")
        if not isinstance(record[name], kinds):
            raise InputError(f"{path}, record {number}: {name!r} must be {_named(kinds)}, got "
                             f"{type(record[name]).__name__}")


def need_all(records: Sequence[Mapping[str, Any]], path: Path, **fields: type | tuple[type, ...]) -> None:
    """Checks every record of a file; see `need`."""
    for number, record in enumerate(records):
        need(record, path, number, **fields)


def _named(kinds: type | tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
