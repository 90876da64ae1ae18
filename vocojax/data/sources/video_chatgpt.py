"""Video-ChatGPT's JSON: raw {video_id, q, a}, or converted to LLaVA's form with `video`."""

import os
from pathlib import Path

from vocojax.data.conversation import conversation_from_llava
from vocojax.data.sources.base import Root, Sample
from vocojax.data.sources.columnar import ColumnarRecords
from vocojax.data.sources.llava import sample_from_llava
from vocojax.layout import LayoutError

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")


class VideoChatGptSource:
    """The records of a Video-ChatGPT JSON file.

    Args:
      path: the JSON file, raw or converted. A raw record's video is `{video_id}` with any of `SUFFIXES`. As in the
        converted file, `<video>` follows the question in even records and precedes it in odd ones.
      video_root: directory of the videos.

    Raises:
      InputError: the file is not a JSON list.
    """

    def __init__(self, path: str | Path, video_root: str | Path):
        self._records, self._root = ColumnarRecords(path), Root(video_root)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        if "conversations" in record:
            return sample_from_llava(record, index, self._root)
        video, question, answer = (record.get(key) for key in ("video_id", "q", "a"))
        if not isinstance(video, str) or not video or not isinstance(question, str):
            raise LayoutError(f"#{index}", "must have a video_id and a question q", "malformed record")
        asked = f"<video>\n{question}" if index % 2 else f"{question}\n<video>"
        conversation = conversation_from_llava(video, [{"from": "human", "value": asked},
                                                       {"from": "gpt", "value": answer}])
        paths = [self._root.file(video, video + suffix, "video") for suffix in SUFFIXES]
        path = next(filter(os.path.exists, paths), paths[0])  # False for a name that is too long
        return Sample(f"{video}/{index}", (), (conversation,), (path,))
