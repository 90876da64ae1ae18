"""Samples, and the interface of the sources that they come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vocojax.data.conversation import Conversation
from vocojax.layout import LayoutError


@dataclass(frozen=True)
class Sample:
    """One record: images or videos, and one or more conversations about them that don't see each other.

    Attributes:
      id: names the record in errors.
      images: files, or their encoded content; each becomes a unit (with `anyres`, several).
      threads: the conversations.
      videos: files; their frames become units, after those of the images.
    """

    id: str
    images: tuple[Path | bytes, ...]
    threads: Sequence[Conversation]
    videos: tuple[Path, ...] = ()


class Source(Protocol):
    """Random access to samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Reads a sample.

        Raises:
          LayoutError: the record can't be used.
        """


class Root:
    """The directory of the files that records name; a record can't name a file outside it.

    Args:
      directory: the directory.
    """

    def __init__(self, directory: str | Path):
        self._directory = Path(directory).resolve()

    def file(self, record: str, name: str, kind: str = "image") -> Path:
        """Returns the path of a file.

        Args:
          record: the record that names the file, for errors.
          name: the file's path in the directory.
          kind: `image` or `video`, for errors.

        Raises:
          LayoutError: the file is outside the directory, or a symbolic link leads there.
        """
        try:
            path = (self._directory / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise LayoutError(record, f"{kind} {name!r} is not a path: {error}", "malformed record") from error
        if not path.is_relative_to(self._directory):
            raise LayoutError(record, f"{kind} {name!r} leaves the {kind} root {self._directory}",
                              f"{kind} outside root")
        return path
