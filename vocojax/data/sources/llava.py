"""LLaVA's instruct and alignment JSON: a list of {id, image?, video?, conversations: [{from, value}, ...]}.

`image` and `video` are a path or a list of paths. Hugging Face's chat data are read as well: `messages` in place of
`conversations`, `images` and `videos` for the lists.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vocojax.data.conversation import conversation_from_llava
from vocojax.data.sources.base import Root, Sample
from vocojax.data.sources.columnar import ColumnarRecords
from vocojax.layout import LayoutError


class LlavaSource:
    """The records of a LLaVA JSON file, or of a Video-ChatGPT file in LLaVA's form (`video` in place of `image`).

    Args:
      path: the JSON file.
      image_root: directory that the records' `image` and `video` paths are relative to.

    Raises:
      InputError: the file is not a JSON list.
    """

    def __init__(self, path: str | Path, image_root: str | Path):
        self._records, self._root = ColumnarRecords(path), Root(image_root)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        return sample_from_llava(self._records[index], index, self._root)


def sample_from_llava(record: Mapping[str, Any], index: int, root: Root) -> Sample:
    """Returns a record of LLaVA's form as a sample.

    Args:
      record: the record.
      index: its number, which names it in errors if it has no `id`.
      root: directory of its images and videos.

    Raises:
      LayoutError: the record can't be used.
    """
    name = str(record.get("id", f"#{index}"))
    conversation = conversation_from_llava(name, record.get("conversations", record.get("messages", ())))
    files = {kind: _names(name, record, kind) for kind in ("image", "video")}
    asked = " ".join(turn.text for turn in conversation if turn.role == "user")
    videos, images = len(files["video"]), len(files["image"])
    if (markers := asked.count("<video>")) > videos:
        raise LayoutError(name, f"has {markers} <video> but {videos} videos", "more <video> than videos")
    images += videos - markers  # a video may be marked <image>, as in LLaMA-VID's and LLaVA-NeXT's data
    if (markers := asked.count("<image>")) > images:
        raise LayoutError(name, f"has {markers} <image> but {images} images", "more <image> than images")
    paths = {kind: tuple(root.file(name, file, kind) for file in names) for kind, names in files.items()}
    return Sample(name, paths["image"], (conversation,), paths["video"])


def _names(record: str, values: Mapping[str, Any], kind: str) -> list[str]:
    names = values.get(kind) or values.get(kind + "s") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise LayoutError(record, f"{kind} must be a path or a list of paths, got {names!r}", "malformed record")
    return names
