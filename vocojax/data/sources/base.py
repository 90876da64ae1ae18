"""Samples, and the interface of the sources that they come from."""

import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vocojax.data.conversation import Conversation
from vocojax.data.videos import FrameSource
from vocojax.layout import LayoutError


@dataclass(frozen=True)
class Sample:
    """One record: images or videos, and one or more conversations about them that don't see each other.

    Attributes:
      id: names the record in errors.
      images: files, or their encoded content; each becomes a unit (with `anyres`, several).
      threads: the conversations.
      videos: files, directories of frames, or lists of frames; their frames become units, after those of the images.
    """

    id: str
    images: tuple[Path | bytes, ...]
    threads: Sequence[Conversation]
    videos: tuple[FrameSource, ...] = ()


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

    A link in the directory is followed: the user put it there. A record can't use one to leave the directory, because
    its `..` are taken out before any link is followed.

    Args:
      directory: the directory.
    """

    def __init__(self, directory: str | Path):
        self._directory, self._unresolved = Path(directory).resolve(), os.path.abspath(directory)

    def file(self, record: str, name: str, kind: str = "image") -> Path:
        """Returns the path of a file.

        Args:
          record: the record that names the file, for errors.
          name: the file's path in the directory, or an absolute one that leads there.
          kind: `image` or `video`, for errors.

        Raises:
          LayoutError: the file is outside the directory.
        """
        if "\0" in name:
            raise LayoutError(record, f"{kind} {name!r} is not a path", "malformed record")
        path = Path(os.path.normpath(os.path.join(self._unresolved, name)))
        if path.is_relative_to(self._unresolved):
            path = self._directory / path.relative_to(self._unresolved)
        if not path.is_relative_to(self._directory):
            raise LayoutError(record, f"{kind} {name!r} leaves the {kind} root {self._directory}",
                              f"{kind} outside root")
        return path
