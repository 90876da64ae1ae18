"""ActivityNet-QA, test: 8,000 questions about 800 videos."""

import functools
from collections.abc import Sequence
from pathlib import Path

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import Item
from vocojax.evaluation.benchmarks.files import find, listed, need_all, read_json
from vocojax.evaluation.benchmarks.video_qa import OpenVideoQa, video

FREE_TYPES = range(3, 9)  # "free" in the official table


class ActivityNetQa(OpenVideoQa):
    """`activitynet_qa/test_q.json`, `test_a.json` and `videos/`."""

    name = "activitynet_qa"

    def __init__(self, root: Path):
        self._path = find(root, "activitynet_qa", "test_q.json")
        answers_path = find(root, "activitynet_qa", "test_a.json")
        self._questions = listed(self._path, read_json(self._path))
        answers = listed(answers_path, read_json(answers_path))
        need_all(self._questions, self._path, question_id=str, question=str, video_name=str)
        need_all(answers, answers_path, question_id=str, answer=(str, int), type=(int, str))
        self._answers = {each["question_id"]: each for each in answers}
        absent = [each["question_id"] for each in self._questions if each["question_id"] not in self._answers]
        if absent:
            raise InputError(f"{answers_path}: lacks {len(absent)} answers, the first is {absent[0]}'s")

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions; a kind is the answer's type."""
        folder = self._path.parent / "videos"
        return [Item(each["question_id"], each["question"],
                     (video(folder, f"v_{each['video_name']}", each["video_name"]),),
                     str(self._answers[each["question_id"]]["answer"]),
                     f"type {self._answers[each['question_id']]['type']}", each) for each in self._questions]

    def by_kind(self, items: Sequence[Item], marks: Sequence[float]) -> dict[str, float]:
        """Returns accuracy by type, and of the free types together."""
        free = [mark for item, mark in zip(items, marks, strict=True)
                if int(item.kind.removeprefix("type ")) in FREE_TYPES]
        found = dict(super().by_kind(items, marks))
        return found | {"free": 100 * sum(free) / len(free)} if free else found
