"""A JSON list of records as an Arrow file: random access without a Python object per record, and without its memory.

The file is made on first use, in `.vocojax` beside the JSON or, where that can't be written, in the user's cache
directory. Its name holds the JSON's size, time stamp and digest, so that an edited JSON gets a new one. It appears only
when it is complete, and one that can't be opened is made again.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from vocojax.files import new_file
from vocojax.layout import LayoutError

VERSION = 2
CHUNK = 2**24  # bytes read at a time
BATCH = 16  # records to an Arrow batch, which is what is read for one of them
LONGEST = len("-Infinity")  # of what the JSON scanner takes or refuses as a whole
_SCHEMA = pa.schema([("record", pa.large_binary()), ("problem", pa.string())])


class ColumnarRecords:
    """The records of a JSON file.

    Args:
      path: a JSON list of records, or (`.jsonl`) one record to a line.

    Raises:
      ValueError: the file is no such JSON; names the byte where it ends to be one.
    """

    def __init__(self, path: str | Path):
        self._file = _columnar_file(Path(path))
        self._open()

    def _open(self) -> None:
        # Read by position: of a mapped file all pages that were ever touched would count as resident.
        self._reader = pa.ipc.open_file(pa.OSFile(str(self._file)))
        batches = self._reader.num_record_batches
        self._batch = self._reader.get_batch(0).num_rows if batches else 1
        self._length = (batches - 1) * self._batch + self._reader.get_batch(batches - 1).num_rows if batches else 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": self._file}  # a worker process opens the file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A record; `LayoutError` if it is no mapping, not UTF-8, or an earlier one over again."""
        batch, place = self._reader.get_batch(index // self._batch), index % self._batch
        problem = batch["problem"][place].as_py()
        if problem:
            raise LayoutError(f"#{index}", f"is {problem}", problem)
        try:
            return json.loads(batch["record"][place].as_py())
        except ValueError as error:  # a number of more digits than Python takes
            raise LayoutError(f"#{index}", f"can't be read: {error}", "malformed record") from error


def parse(path: Path) -> Iterator[tuple[bytes, str]]:
    """The records of a JSON file as (their text, what is wrong with them or '').

    Raises:
      ValueError: the file's own structure is damaged.
    """
    seen: set[bytes] = set()
    with path.open("rb") as file:
        for text, problem in _lines(file) if path.suffix == ".jsonl" else _elements(file, path):
            digest = hashlib.blake2b(text, digest_size=8).digest()
            if not problem and digest in seen:
                problem = "duplicate record"
            seen.add(digest)
            yield text, problem


def _lines(file: Any) -> Iterator[tuple[bytes, str]]:
    for line in filter(None, map(bytes.strip, file)):
        try:
            yield line, _problem(line, json.loads(line.decode("latin-1")))
        except (ValueError, RecursionError):
            yield line, "malformed record"


def _problem(text: bytes, record: Any) -> str:
    try:
        text.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return "" if isinstance(record, dict) else "malformed record"


def _elements(file: Any, path: Path) -> Iterator[tuple[bytes, str]]:
    """The elements of a list, found by the standard library's scanner; one that is not UTF-8 keeps its bytes."""
    decoder, text, offset = json.JSONDecoder(parse_int=str), "", 0  # an integer may have any number of digits

    def bad(what: str) -> ValueError:
        return ValueError(f"{path}: not a JSON list in UTF-8: {what} at byte {offset}")

    def more() -> bool:
        nonlocal text
        # latin-1 keeps every byte one character: ends of records and offsets are right whatever a record holds.
        chunk = file.read(CHUNK).decode("latin-1")
        text += chunk
        return bool(chunk)

    def drop(count: int) -> None:
        nonlocal text, offset
        text, offset = text[count:], offset + count

    def skip_space() -> None:
        while True:
            left = text.lstrip(" \t\r\n")
            drop(len(text) - len(left))
            if text or not more():
                return

    if file.read(3) != b"\xef\xbb\xbf":
        file.seek(0)
    skip_space()
    if not text.startswith("["):
        raise bad("no '['") if not text.startswith("{") else ValueError(
            f"{path}: must hold a list of records, holds a mapping")
    drop(1)
    skip_space()
    if text.startswith("]"):
        return
    while True:
        place = 0
        while True:  # the elements that lie whole in the text at hand
            try:
                record, end = decoder.raw_decode(text, place)
            except RecursionError:
                raise bad("an element nested too deeply") from None
            except json.JSONDecodeError as error:
                # All but a string without an end is found where it is; further on there may be text to come.
                damaged = not error.msg.startswith("Unterminated") and error.pos < len(text) - LONGEST
                drop(place)
                if damaged or not more():
                    raise bad(f"{error}") from None
                break
            following = end
            while following < len(text) and text[following] in " \t\r\n":
                following += 1
            if following == len(text):
                drop(place)
                if not more():
                    raise bad("the list does not end")
                break
            element = text[place:end].encode("latin-1")
            yield element, _problem(element, record)
            if text[following] == "]":
                return
            if text[following] != ",":
                drop(following)
                raise bad("no ','")
            place = following + 1
            while place < len(text) and text[place] in " \t\r\n":
                place += 1
            if place == len(text):
                drop(place)
                skip_space()
                break


def _columnar_file(path: Path) -> Path:
    """The Arrow file of a JSON file, made if it is not there."""
    status = path.stat()
    folders = [path.parent / ".vocojax", Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vocojax"]
    name = f"{path.name}.{status.st_size}.{status.st_mtime_ns}.{sample_digest(path)}.{VERSION}.arrow"
    for folder in folders:
        if _opens(folder / name):
            return folder / name
    problems = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with new_file(folder / name) as partial:
                _write(path, partial)
            return folder / name
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
    raise OSError(f"{path}: no place for its columnar file: {'; '.join(problems)}")


def _opens(file: Path) -> bool:
    try:
        pa.ipc.open_file(pa.OSFile(str(file)))
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def sample_digest(path: Path) -> str:
    """Of a file's size, beginning, middle and end: what tells one that was edited without reading all of it."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        for start in (0, size // 2, max(size - 2**20, 0)):
            file.seek(start)
            digest.update(file.read(2**20))
    return digest.hexdigest()


def _write(path: Path, target: Path) -> None:
    with target.open("wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        texts: list[bytes] = []
        problems: list[str] = []

        def flush() -> None:
            writer.write_batch(pa.record_batch([pa.array(texts, pa.large_binary()), pa.array(problems)], _SCHEMA))
            texts.clear()
            problems.clear()

        for text, problem in parse(path):
            texts.append(text)
            problems.append(problem)
            if len(texts) == BATCH:
                flush()
        if texts:
            flush()
