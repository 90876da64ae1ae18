"""What a source of training or evaluation data gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vocojax.data.conversation import Conversation


@dataclass(frozen=True)
class Sample:
    """One record: images (each becomes a unit), and one or more conversations about them that don't see each other."""

    id: str
    images: tuple[Path, ...]
    threads: Sequence[Conversation]


class Source(Protocol):
    """Random access to samples. `__getitem__` raises `LayoutError` for a record that can't be used."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...
