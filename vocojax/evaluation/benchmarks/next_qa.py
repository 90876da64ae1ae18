"""NExT-QA, multiple choice: causal, temporal and descriptive questions."""

import functools
from collections.abc import Sequence
from pathlib import Path

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import Item
from vocojax.evaluation.benchmarks.files import find, find_optional, read_json
from vocojax.evaluation.benchmarks.tables import read_table
from vocojax.evaluation.benchmarks.video_choice import VideoChoice, choice_prompt
from vocojax.evaluation.benchmarks.video_qa import video
from vocojax.evaluation.metrics.choices import LETTERS

OPTIONS = ("a0", "a1", "a2", "a3", "a4")
GROUPS = {"C": "causal", "T": "temporal", "D": "descriptive"}


class NextQa(VideoChoice):
    """`nextqa/test.csv` (the data set for multiple choice), `map_vid_vidorID.json` and `videos/`.

    A question's id is `VIDEO_QID`, as in the official result files.
    """

    name = "nextqa"

    def __init__(self, root: Path):
        self._path = find(root, "nextqa", "test.csv", "nextqa/test.csv", "MC/test.csv")
        self._rows = read_table(self._path, self._path.read_text(encoding="utf-8"), ",",
                                ("video", "question", "answer", "qid", "type", *OPTIONS))
        mapping = find_optional(root, "nextqa", "map_vid_vidorID.json")
        self._folders: dict[str, str] = read_json(mapping) if mapping else {}

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions."""
        items = []
        for number, row in enumerate(self._rows):
            if row["answer"] not in tuple("01234"):
                raise InputError(f"{self._path}, record {number}: 'answer' must be 0 to 4, got {row['answer']!r}")
            options = [row[name] for name in OPTIONS]
            seen = video(self._path.parent / "videos", self._folders.get(row["video"], row["video"]), row["video"])
            items.append(Item(f"{row['video']}_{row['qid']}", choice_prompt(row["question"], options), (seen,),
                              LETTERS[int(row["answer"])], row["type"], {**row, "options": options}))
        return items

    def by_kind(self, items: Sequence[Item], marks: Sequence[float]) -> dict[str, float]:
        """Returns accuracy by type, and of the causal, temporal and descriptive questions."""
        groups: dict[str, list[float]] = {}
        for item, mark in zip(items, marks, strict=True):
            groups.setdefault(GROUPS.get(item.kind[:1], item.kind), []).append(mark)
        return dict(super().by_kind(items, marks)) | {name: 100 * sum(own) / len(own) for name, own in groups.items()}
