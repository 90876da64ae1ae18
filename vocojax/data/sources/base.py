"""What a source of training or evaluation data gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vocojax.data.conversation import Conversation
from vocojax.layout import LayoutError


@dataclass(frozen=True)
class Sample:
    """One record: visual units, and one or more conversations about them that don't see each other.

    Attributes:
      images: files, or their encoded content; each becomes a unit (with `anyres`, several).
      videos: files whose frames become units, behind those of the images.
    """

    id: str
    images: tuple[Path | bytes, ...]
    threads: Sequence[Conversation]
    videos: tuple[Path, ...] = ()


class Source(Protocol):
    """Random access to samples. `__getitem__` raises `LayoutError` for a record that can't be used."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Root:
    """A directory that records name files in, and that they must not leave."""

    def __init__(self, directory: str | Path):
        self._directory = Path(directory).resolve()

    def file(self, record: str, name: str, kind: str = "image") -> Path:
        """The path of a file; `LayoutError` for one outside the directory, also by a symbolic link."""
        try:
            path = (self._directory / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise LayoutError(record, f"{kind} {name!r} is no path: {error}", "malformed record") from error
        if not path.is_relative_to(self._directory):
            raise LayoutError(record, f"{kind} {name!r} leaves the {kind} root {self._directory}",
                              f"{kind} outside root")
        return path
