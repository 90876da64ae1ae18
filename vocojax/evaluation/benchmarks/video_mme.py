"""Video-MME, without subtitles: multiple choice about short, medium and long videos."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from vocojax.evaluation.benchmarks.base import Benchmark, Item, Missing
from vocojax.evaluation.benchmarks.files import find, listed, need_all, read_json
from vocojax.evaluation.benchmarks.video_qa import video
from vocojax.evaluation.metrics import accuracy_by_kind
from vocojax.evaluation.metrics.choices import video_mme_letter
from vocojax.files import json_line
from vocojax.inference.decoding.sampling import SamplingConfig

PROMPT = ("Select the best answer to the following multiple-choice question based on the video. Respond with only the "
          "letter (A, B, C, or D) of the correct option.\n{question}\n{options}\nThe best answer is:")


class VideoMme(Benchmark):
    """`videomme/test-00000-of-00001.parquet` (or its records as `test.json`) and `videomme/data/`."""

    name = "videomme"
    sampling = SamplingConfig(max_new_tokens=16)
    missing = Missing(False, "scores the responses that are there")
    counts_unreadable = False  # officially only answers with a letter are in the denominator
    text_fields = ("response", "text", "answer")
    notes = ("without subtitles",)

    def __init__(self, root: Path):
        self._path = find(root, "videomme", "test-00000-of-00001.parquet", "videomme/test-00000-of-00001.parquet",
                          "test.json")
        content = (pyarrow.parquet.read_table(self._path).to_pylist() if self._path.suffix == ".parquet"
                   else read_json(self._path))
        self._questions = listed(self._path, content)
        need_all(self._questions, self._path, question_id=str, videoID=str, question=str, options=list, duration=str)

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions."""
        return [Item(each["question_id"],
                     PROMPT.format(question=each["question"], options="\n".join(each["options"])),
                     (video(self._path.parent / "data", each["videoID"]),), each.get("answer"), each["duration"], each)
                for each in self._questions]

    def mark(self, item: Item, text: str, convention: str) -> float | None:
        """Returns 1 if the letter is right."""
        letter = video_mme_letter(text)
        return None if letter is None else float(letter == item.gold)

    def by_kind(self, items: Sequence[Item], marks: Sequence[float]) -> dict[str, float]:
        """Returns accuracy by duration, domain and type of task."""
        return {f"{field}: {kind}": 100 * mean for field in ("duration", "domain", "task_type")
                for kind, mean in accuracy_by_kind(marks, [item.record.get(field, "") for item in items]).items()}

    def submission(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Returns the file that the official script takes."""
        videos: dict[str, dict[str, Any]] = {}
        for item in self.items:
            each = item.record
            shared = {name: each.get(name) for name in ("video_id", "duration", "domain", "sub_category")}
            entry = videos.setdefault(each["videoID"], {**shared, "questions": []})
            asked = {name: each.get(name) for name in ("question_id", "task_type", "question", "options", "answer")}
            entry["questions"].append({**asked, "response": texts.get(item.id, "")})
        return {"videomme.json": json_line(list(videos.values()))}
