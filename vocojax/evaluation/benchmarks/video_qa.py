"""What the open-ended video benchmarks share: short gold answers, exact match here, and a judge model elsewhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from vocojax.evaluation.benchmarks.base import Benchmark, Item, Missing
from vocojax.inference.visuals import Video

SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov")
FRAMES = 8


class OpenVideoQa(Benchmark):
    """Questions about videos with one gold answer each.

    The score is the official exact match: equality, without any cleaning. Papers report a judge model's accuracy beside
    it (`evaluation.judge`). The prompt is only the question; answers are greedy, where the papers' code samples at
    temperature 0.2.
    """

    missing: ClassVar[Missing] = Missing(False, "judges the answers that are there")
    text_fields = ("pred", "text", "answer")
    notes: tuple[str, ...] = ("exact match; papers report a judge model's accuracy (--judge)",)

    def mark(self, item: Item, text: str, convention: str) -> float:
        """Returns 1 if the answer is the gold answer."""
        return float(text == item.gold)

    def submission(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Returns the file that Video-ChatGPT's judge script takes."""
        return {f"{self.name}_pred.json": json.dumps([
            {"id": item.id, "video_name": str(item.record.get("video_name", item.record.get("video_id", item.id))),
             "Q": item.record["question"], "A": item.gold, "pred": texts[item.id]}
            for item in self.items if item.id in texts])}


def video(folder: Path, *stems: str) -> Video:
    """Returns a video of a folder: the first file that is there of any of the names, with a usual suffix."""
    paths = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
    return Video(next((path for path in paths if path.exists()), paths[0]), FRAMES)
