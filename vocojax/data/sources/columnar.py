"""Random access to the records of a large JSON file, without a Python object in memory for each.

On first use the records are copied to an Arrow file, in `.vocojax` next to the JSON or, where that can't be written, in
the user's cache directory. The file's name holds the digest of all of the JSON's bytes, so an edited JSON gets a new
one. A damaged Arrow file is made again.
"""

import codecs
import hashlib
import json
import logging
import mmap
import os
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
from tqdm import tqdm

from vocojax.data.sources.arrow_file import ArrowFile, DamagedFile, write_batches
from vocojax.errors import InputError
from vocojax.files import new_file
from vocojax.layout import LayoutError

LOG = logging.getLogger(__name__)
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
        self._path, self._making = Path(path), threading.Lock()
        self._digest = file_digest(self._path)
        self._arrow = _arrow_file(self._path, self._digest)

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_digest": self._digest, "_file": self._arrow.path}

    def __setstate__(self, state: dict[str, Any]) -> None:  # a worker process opens the file itself
        self._path, self._digest, self._making = state["_path"], state["_digest"], threading.Lock()
        self._arrow = _opened(state["_file"]) or _arrow_file(self._path, self._digest)

    def __len__(self) -> int:
        return len(self._arrow)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads a record.

        Raises:
          LayoutError: it is not a mapping, not UTF-8, or a copy of an earlier record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self._path}: has {len(self)} records, no record {index}")
        batch, place = self._batch(index // self._arrow.batch_size), index % self._arrow.batch_size
        problem = batch["problem"][place].as_py()
        if problem:
            raise LayoutError(f"#{index}", f"is {problem}", problem)
        try:
            return json.loads(batch["record"][place].as_py())
        except ValueError as error:  # a number with more digits than Python takes
            raise LayoutError(f"#{index}", f"can't be read: {error}", "malformed record") from error

    def _batch(self, number: int) -> pa.RecordBatch:
        """Reads a batch; if it is damaged, the Arrow file is made again."""
        arrow = self._arrow
        try:
            return arrow.batch(number)
        except DamagedFile as error:
            with self._making:  # only the first of several threads makes it
                if self._arrow is arrow:
                    LOG.warning("%s; making it again from %s", error, self._path)
                    self._arrow = _arrow_file(self._path, self._digest, {arrow.path})
        return self._arrow.batch(number)


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


def _arrow_file(path: Path, digest: str, damaged: Collection[Path] = ()) -> ArrowFile:
    """Opens the Arrow file of a JSON file, and makes it if it is not there.

    Args:
      path: the JSON file.
      digest: its `file_digest`.
      damaged: Arrow files of it that are not to be used.
    """
    folders = [path.parent / ".vocojax", Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vocojax"]
    files = [folder / f"{path.name}.{digest}.{VERSION}.arrow" for folder in folders]
    for file in files:
        if file not in damaged and (arrow := _opened(file)):
            return arrow
    problems = []
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with new_file(file) as partial:
                write_batches(partial, _SCHEMA, parse(path), BATCH)
                if file_digest(path) != digest:
                    raise InputError(f"{path}: was edited while it was read; start again when it is complete")
            return ArrowFile(file, _SCHEMA)
        except OSError as error:
            problems.append(f"{file.parent}: {error.strerror or error}")
    raise OSError(f"{path}: no place for its Arrow file: {'; '.join(problems)}; free space there, or set "
                  "XDG_CACHE_HOME to a directory with room for a copy of the JSON")


def _opened(file: Path) -> ArrowFile | None:
    """Opens an Arrow file; None if it is not there or damaged."""
    try:
        return ArrowFile(file, _SCHEMA) if file.is_file() else None
    except (OSError, DamagedFile):
        return None


def file_digest(path: Path) -> str:
    """Returns a digest of all of a file's bytes, about a second per GB; a progress bar is shown if it takes longer."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file, tqdm(total=os.fstat(file.fileno()).st_size, unit="B", unit_scale=True, delay=3,
                                       desc=f"reading {path.name}", leave=False) as bar:
        while part := file.read(2**22):
            digest.update(part)
            bar.update(len(part))
    return digest.hexdigest()


def sampled_digest(path: Path) -> str:
    """Returns the digest that data states of version 0.1 hold: of the size, the beginning, the middle and the end."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        for start in (0, size // 2, max(size - 2**20, 0)):
            file.seek(start)
            digest.update(file.read(2**20))
    return digest.hexdigest()
