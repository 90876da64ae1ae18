"""What the benchmarks in Shikra's format share: jsonl records about boxes on an image, and its answer files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import Benchmark, Missing
from vocojax.evaluation.benchmarks.files import find, find_optional, need_all, read_json_lines


class ShikraBenchmark(Benchmark):
    """A jsonl file in Shikra's format.

    A question's id is its `id` in the file or else its line's number, from 0. Shikra's own answer files have lines
    `{"pred": ..., "target": ...}` without ids: they are matched by position, and the targets must agree.

    Args:
      name: of the benchmark.
      root: of all data.
      file: the annotation file's name, in the folder `shikra`.
      images: folders that may hold the images, relative to the root.
      fields: types of the records' fields.
    """

    missing: ClassVar[Missing] = Missing(False, "pairs answers and targets by position")
    text_fields = ("pred", "text", "answer")

    def __init__(self, name: str, root: Path, file: str, images: Sequence[str], **fields: type | tuple[type, ...]):
        self.name = name
        self._path = find(root, "shikra", file)
        self._records = read_json_lines(self._path)
        need_all(self._records, self._path, **fields)
        found = [folder for name in images if (folder := find_optional(root, ".", name)) is not None]
        self._images = found[0] if found else Path(root) / images[0]

    def _id(self, number: int, record: Mapping[str, Any]) -> str:
        return str(record.get("id", number))

    def _size(self, record: Mapping[str, Any], image: Path) -> tuple[int, int]:
        """Returns width and height of a record's image: the record's own, or else the file's."""
        if isinstance(record.get("width"), int) and isinstance(record.get("height"), int):
            return record["width"], record["height"]
        try:
            with Image.open(image) as opened:
                return opened.size
        except OSError as error:
            raise InputError(f"{image}: its size is needed for the boxes of {self._path.name}, and it can't be read: "
                             f"{error}") from error

    def target(self, number: int) -> str | None:
        """Returns the target text of the question of this number, as Shikra writes it; None where it has several."""
        return None

    def locate(self, records: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """Finds answers by id, or by position in Shikra's own files."""
        if not all("target" in record and self.identify(record) is None for record in records):
            return super().locate(records)
        found: list[str | None] = []
        for number, record in enumerate(records):
            if number >= len(self.items):
                found.append(f"line {number + 1}")
                continue
            expected = self.target(number)
            agrees = expected is None or expected in str(record["target"])
            found.append(self.items[number].id if agrees else
                         f"line {number + 1} with the target {record['target']!r} (the annotation has {expected!r})")
        return found
