"""LLaVA's instruct and alignment JSON: a list of {id, image?, conversations: [{from, value}, ...]}."""

import json
from pathlib import Path

from vocojax.data.conversation import conversation_from_llava
from vocojax.data.sources.base import Root, Sample
from vocojax.layout import LayoutError


class LlavaSource:
    """The records of a LLaVA JSON file.

    Args:
      path: the JSON file.
      image_root: directory that the records' `image` paths are relative to.

    Raises:
      ValueError: the file is no JSON list.
    """

    def __init__(self, path: str | Path, image_root: str | Path):
        try:
            records = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a JSON file in UTF-8: {error}") from error
        if not isinstance(records, list):
            raise ValueError(f"{path}: must hold a list of records, holds a {type(records).__name__}")
        self._records, self._root = records, Root(image_root)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        if not isinstance(record, dict):
            raise LayoutError(f"#{index}", f"must be a mapping, is a {type(record).__name__}", "malformed record")
        name = str(record.get("id", f"#{index}"))
        conversation = conversation_from_llava(name, record.get("conversations", ()))
        images = record.get("image") or []
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise LayoutError(name, f"image must be a path or a list of paths, got {images!r}", "malformed record")
        paths = tuple(self._root.file(name, image) for image in images)
        markers = sum(turn.text.count("<image>") for turn in conversation if turn.role == "user")
        if markers > len(paths):
            raise LayoutError(name, f"has {markers} <image> but {len(paths)} images", "more <image> than images")
        return Sample(name, paths, (conversation,))
