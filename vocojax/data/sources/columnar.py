"""Random access to the records of a large JSON file, without a Python object in memory for each.

On first use the records are copied to an Arrow file, in `.vocojax` next to the JSON or, where that can't be written, in
the user's cache directory. The file's name holds the JSON's size, time stamp and digest, so an edited JSON gets a new
one. An Arrow file that can't be opened is made again.
"""

import codecs
import hashlib
import itertools
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from vocojax.errors import InputError
from vocojax.files import new_file
from vocojax.layout import LayoutError

VERSION = 3  # of the Arrow files
BATCH = 16  # records per Arrow batch; reading one record reads its batch
_LIST = msgspec.json.Decoder(list[msgspec.Raw])  # finds where each element begins and ends without decoding it
_SCHEMA = pa.schema([("record", pa.large_binary()), ("problem", pa.string())])


class ColumnarRecords:
    """The records of a JSON file.

    Args:
      path: a JSON list of records, or (`.jsonl`) one record per line.

    Raises:
      InputError: the file is not such a JSON; the message says at which byte.
      OSError: the file can't be read, or there is no place for the Arrow file.
    """

    def __init__(self, path: str | Path):
        self._file = _columnar_file(Path(path))
        self._open()

    def _open(self) -> None:
        # Read by position: if it were mapped, every page that was ever read would count as resident.
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
        """Reads a record.

        Raises:
          LayoutError: it is not a mapping, not UTF-8, or a copy of an earlier record.
        """
        batch, place = self._reader.get_batch(index // self._batch), index % self._batch
        problem = batch["problem"][place].as_py()
        if problem:
            raise LayoutError(f"#{index}", f"is {problem}", problem)
        try:
            return json.loads(batch["record"][place].as_py())
        except ValueError as error:  # a number with more digits than Python takes
            raise LayoutError(f"#{index}", f"can't be read: {error}", "malformed record") from error


def parse(path: Path) -> Iterator[tuple[bytes, str]]:
    """Yields each record of a JSON file as (its text, what is wrong with it or '').

    Raises:
      InputError: the list itself is damaged.
    """
    seen: set[bytes] = set()
    for text, problem in _lines(path) if path.suffix == ".jsonl" else _elements(path):
        digest = hashlib.blake2b(text, digest_size=8).digest()
        if not problem and digest in seen:
            problem = "duplicate record"
        seen.add(digest)
        yield text, problem


def _lines(path: Path) -> Iterator[tuple[bytes, str]]:
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise InputError(f"{path}: is UTF-16: save it as UTF-8")
        file.seek(0)
        for text in file:
            line = text.removeprefix(codecs.BOM_UTF8).strip()  # every file of several that were joined has its own mark
            if not line:
                continue
            try:
                json.loads(line.decode("latin-1"))  # accepts any bytes; `_problem` checks for UTF-8
            except (ValueError, RecursionError):
                yield line, "malformed record"
            else:
                yield line, _problem(line)


def _elements(path: Path) -> Iterator[tuple[bytes, str]]:
    if path.stat().st_size == 0:  # an empty file can't be mapped
        raise InputError(f"{path}: not a JSON list in UTF-8: the file is empty")
    with path.open("rb") as file:
        # Mapped, so that the system can drop its pages. The elements are views: it is closed after the last of them.
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        records: Iterator[bytes] = map(bytes, _LIST.decode(text))
    except (msgspec.DecodeError, RecursionError):
        records = _elements_of_lenient_json(text, path)
    for record in records:
        yield record, _problem(record)


def _elements_of_lenient_json(text: mmap.mmap, path: Path) -> Iterator[bytes]:
    """Yields the elements of a list that is not strict JSON.

    Some writers put NaN, half a surrogate pair (a cut emoji) or a byte order mark into a file. The first two are a
    problem of one record, which must not cost the others; the last one is none. So the elements are found in a strict
    text of the same length, with every element in the same place.
    """
    strict = bytes(text)
    if strict.startswith(codecs.BOM_UTF8):
        strict = b"   " + strict[3:]
    for odd, plain in ((rb"\ud", rb"\u0"), (rb"\uD", rb"\u0"), (b"NaN", b"0.0"), (b"Infinity", b"0.000000")):
        strict = strict.replace(odd, plain)
    try:
        elements = _LIST.decode(strict)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON list in UTF-8: {error}; join several lists with `jq -s add`, and name a "
                         "file of one record per line .jsonl") from None
    end = 0
    for element in elements:
        start = strict.find(element, end)
        end = start + len(memoryview(element))
        yield text[start:end]


def _problem(text: bytes) -> str:
    try:
        text.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return "" if text.startswith(b"{") else "malformed record"


def _columnar_file(path: Path) -> Path:
    """Returns the Arrow file of a JSON file, and makes it if it is not there."""
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
    raise OSError(f"{path}: no place for its Arrow file: {'; '.join(problems)}; free space there, or set "
                  "XDG_CACHE_HOME to a directory with room for a copy of the JSON")


def _opens(file: Path) -> bool:
    try:
        pa.ipc.open_file(pa.OSFile(str(file)))
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def sample_digest(path: Path) -> str:
    """Returns a digest of a file's size, beginning, middle and end, which tells an edited file in milliseconds."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        for start in (0, size // 2, max(size - 2**20, 0)):
            file.seek(start)
            digest.update(file.read(2**20))
    return digest.hexdigest()


def _write(path: Path, target: Path) -> None:
    with target.open("wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        records = parse(path)
        while batch := list(itertools.islice(records, BATCH)):
            texts, problems = zip(*batch, strict=True)
            writer.write_batch(pa.record_batch([pa.array(texts, pa.large_binary()), pa.array(problems)], _SCHEMA))
