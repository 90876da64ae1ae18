"""A file of Arrow record batches in which a damaged byte is noticed before anything is made of it.

    an Arrow stream: the schema, the batches
    int64 [batches, 4]: where each batch begins, its bytes, their CRC-32, its records
    int64: the number of batches
    32 bytes: BLAKE2b of the last two

The index is checked when the file is opened, a batch when it is read. Arrow has no checksums, and a damaged offset
in a batch ends the process.
"""

import hashlib
import itertools
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

_ENTRY = 4  # numbers of a batch in the index
_DIGEST = 32
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


class DamagedFile(ValueError):
    """A file that is not, or no longer, what was written."""


def write_batches(target: Path, schema: pa.Schema, records: Iterable[tuple[object, ...]], batch_size: int) -> None:
    """Writes records to a new file.

    Args:
      target: the file.
      schema: a field for each value of a record.
      records: any number of them; a batch at a time is in memory.
      batch_size: records per batch; the last one may have fewer.
    """
    index, records = [], iter(records)
    with target.open("wb") as file:
        file.write(schema.serialize())
        while batch := list(itertools.islice(records, batch_size)):
            columns = zip(schema, zip(*batch, strict=True), strict=True)
            content = pa.record_batch([pa.array(column, field.type) for field, column in columns], schema).serialize()
            index.append((file.tell(), len(content), zlib.crc32(content), len(batch)))
            file.write(content)
        tail = np.array(index, "<i8").tobytes() + len(index).to_bytes(8, "little")
        file.write(_END + tail + _digest(tail))


class ArrowFile:
    """The batches of a file that `write_batches` wrote, read by position. Threads may share it.

    (If it were mapped, every page that was ever read would count as resident.)

    Args:
      path: the file.
      schema: as it was written.

    Attributes:
      path: as given.
      batch_size: records per batch, of all but the last.

    Raises:
      DamagedFile: the index is damaged.
      OSError: the file can't be read.
    """

    def __init__(self, path: Path, schema: pa.Schema):
        self.path, self._schema = path, schema
        self._file: IO[bytes] = path.open("rb")
        size = os.fstat(self._file.fileno()).st_size
        end = self._read(max(size - 8 - _DIGEST, 0), 8 + _DIGEST)
        batches = int.from_bytes(end[:8], "little")
        if len(end) < 8 + _DIGEST or batches * 8 * _ENTRY > size:
            raise DamagedFile(f"{path}: its index is damaged")
        index = self._read(size - len(end) - batches * 8 * _ENTRY, batches * 8 * _ENTRY)
        if _digest(index + end[:8]) != end[8:]:
            raise DamagedFile(f"{path}: its index is damaged")
        self._index = np.frombuffer(index, "<i8").reshape(batches, _ENTRY)
        self.batch_size = int(self._index[0, 3]) if batches else 1

    def __len__(self) -> int:
        return int(self._index[:, 3].sum())

    def batch(self, number: int) -> pa.RecordBatch:
        """Reads a batch.

        Raises:
          DamagedFile: its bytes are not those that were written.
          OSError: the file can't be read.
        """
        start, length, checksum, _ = map(int, self._index[number])
        content = self._read(start, length)
        if len(content) != length or zlib.crc32(content) != checksum:
            raise DamagedFile(f"{self.path}: its batch {number} is damaged (checksum)")
        return pa.ipc.read_record_batch(pa.py_buffer(content), self._schema)

    def _read(self, start: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, start)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()
