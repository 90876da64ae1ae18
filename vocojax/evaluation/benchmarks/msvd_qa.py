"""MSVD-QA, test: questions about short clips."""

import functools
from pathlib import Path

from vocojax.evaluation.benchmarks.base import Item
from vocojax.evaluation.benchmarks.files import find, find_optional, listed, need_all, read_json
from vocojax.evaluation.benchmarks.video_qa import OpenVideoQa, video
from vocojax.inference.visuals import Video


class MsvdQa(OpenVideoQa):
    """`msvd_qa/test_qa.json`, `youtube_mapping.txt` (NAME vidNUMBER in a line) and `videos/`."""

    name = "msvd_qa"

    def __init__(self, root: Path):
        self._path = find(root, "msvd_qa", "test_qa.json")
        self._questions = listed(self._path, read_json(self._path))
        need_all(self._questions, self._path, id=(int, str), video_id=(int, str), question=str, answer=str)
        mapping = find_optional(root, "msvd_qa", "youtube_mapping.txt")
        lines = mapping.read_text(encoding="utf-8-sig").split("\n") if mapping else []
        self._names = {vid: name for name, vid in (line.split() for line in lines if line.strip())}

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions."""
        folder = self._path.parent / "videos"
        return [Item(str(each["id"]), each["question"], (self._video(folder, f"vid{each['video_id']}"),),
                     each["answer"], record=each) for each in self._questions]

    def _video(self, folder: Path, vid: str) -> Video:
        return video(folder, *([self._names[vid]] if vid in self._names else []), vid)
