"""MSRVTT-QA, test: questions about web videos."""

import functools
from pathlib import Path

from vocojax.evaluation.benchmarks.base import Item
from vocojax.evaluation.benchmarks.files import find, listed, need_all, read_json
from vocojax.evaluation.benchmarks.video_qa import OpenVideoQa, video


class MsrvttQa(OpenVideoQa):
    """`msrvtt_qa/test_qa.json` and `videos/`."""

    name = "msrvtt_qa"

    def __init__(self, root: Path):
        self._path = find(root, "msrvtt_qa", "test_qa.json")
        self._questions = listed(self._path, read_json(self._path))
        need_all(self._questions, self._path, id=(int, str), video_id=(int, str), question=str, answer=str)

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions."""
        folder = self._path.parent / "videos"
        return [Item(str(each["id"]), each["question"], (video(folder, f"video{each['video_id']}"),), each["answer"],
                     record=each) for each in self._questions]
