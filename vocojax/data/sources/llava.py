"""LLaVA's instruct and alignment JSON: a list of {id, image?, video?, conversations: [{from, value}, ...]}.

`image` and `video` are a path or a list of paths; a video may be a directory of frames, and `frames` lists those of one
video. Hugging Face's chat data are read as well: `messages` in place of `conversations`, `images` and `videos` for the
lists.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vocojax.data.conversation import conversation_from_llava
from vocojax.data.sources.base import Root, Sample
from vocojax.data.sources.columnar import ColumnarRecords
from vocojax.data.videos import FrameSource
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
    images = _files(name, record.get("image") or record.get("images"), root, "image")
    frames = _files(name, record["frames"], root, "frame") if isinstance(record.get("frames"), list) else ()
    videos: tuple[FrameSource, ...] = _files(name, record.get("video") or record.get("videos"), root, "video")
    videos += (frames,) if frames else ()
    asked = " ".join(turn.text for turn in conversation if turn.role == "user")
    if (marked := asked.count("<video>")) > len(videos):
        raise LayoutError(name, f"has {marked} <video> but {len(videos)} videos", "more <video> than videos")
    # <image> may mark a video, as in LLaMA-VID's and LLaVA-NeXT's data, or one of a list of frames.
    most = len(images) + len(videos) - marked + len(frames)
    if (marked := asked.count("<image>")) > most:
        raise LayoutError(name, f"has {marked} <image> but {most} images", "more <image> than images")
    return Sample(name, images, (conversation,), videos)


def _files(record: str, names: Any, root: Root, kind: str) -> tuple[Path, ...]:
    names = [names] if isinstance(names, str) else names or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise LayoutError(record, f"{kind} must be a path or a list of paths, got {names!r}", "malformed record")
    return tuple(root.file(record, name, kind) for name in names)
