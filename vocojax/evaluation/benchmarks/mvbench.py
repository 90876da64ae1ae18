"""MVBench: multiple choice in twenty tasks about short videos."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import Item
from vocojax.evaluation.benchmarks.files import find, listed, need_all, read_json
from vocojax.evaluation.benchmarks.video_choice import VideoChoice, choice_prompt
from vocojax.evaluation.metrics.choices import LETTERS
from vocojax.inference.visuals import Video

FOLDERS = {  # task -> the folder of its videos in the official download
    "action_antonym": "ssv2_video", "action_count": "perception/videos", "action_localization": "sta/sta_video",
    "action_prediction": "star/Charades_v1_480", "action_sequence": "star/Charades_v1_480",
    "character_order": "perception/videos", "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa", "episodic_reasoning": "tvqa/frames_fps3_hq",
    "fine_grained_action": "Moments_in_Time_Raw/videos", "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer/video_validation", "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation", "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480", "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video", "state_change": "perception/videos", "unexpected_action": "FunQA_test/test",
}


class MvBench(VideoChoice):
    """`mvbench/json/<task>.json` and `mvbench/video/`; an id is `TASK/NUMBER`, the number in the file from 0."""

    name = "mvbench"
    notes = (*VideoChoice.notes, "whole videos: the tasks' start and end times are not applied")

    def __init__(self, root: Path):
        self._folder = find(root, "mvbench", "json")
        self._tasks: dict[str, list[Any]] = {}
        for path in sorted(self._folder.glob("*.json")):
            self._tasks[path.stem] = list(listed(path, read_json(path)))
            need_all(self._tasks[path.stem], path, video=str, question=str, candidates=list, answer=str)
        if not self._tasks:
            raise InputError(f"{self._folder}: holds no <task>.json")

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions, by task."""
        items = []
        for task, records in self._tasks.items():
            folder = self._folder.parent / "video" / FOLDERS.get(task, task)
            for number, each in enumerate(records):
                options = list(map(str, each["candidates"]))
                gold = LETTERS[options.index(each["answer"])] if each["answer"] in options else None
                items.append(Item(f"{task}/{number}", choice_prompt(each["question"], options),
                                  (Video(folder / each["video"]),), gold, task, {**each, "options": options}))
        return items

    def metrics(
        self, items: Sequence[Item], texts: Sequence[str | None], marks: Sequence[float], convention: str
    ) -> dict[str, float]:
        """Returns the mean over the tasks, as the leaderboard does, and the accuracy over all questions."""
        tasks = self.by_kind(items, marks)
        return {"mean of tasks": sum(tasks.values()) / len(tasks), "accuracy": 100 * sum(marks) / len(marks)}
