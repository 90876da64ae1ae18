"""EgoSchema: multiple choice about three-minute first-person videos; the labels of 500 questions are public."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vocojax.evaluation.benchmarks.base import Item
from vocojax.evaluation.benchmarks.files import find, listed, need_all, read_json
from vocojax.evaluation.benchmarks.video_choice import VideoChoice, choice_prompt
from vocojax.evaluation.benchmarks.video_qa import video
from vocojax.evaluation.metrics.choices import LETTERS, option_letter

OPTIONS = tuple(f"option {number}" for number in range(5))
UNREADABLE = -1  # the submission's number for an answer without an option


class EgoSchema(VideoChoice):
    """`egoschema/questions.json`, `egoschema/subset_answers.json` and `egoschema/videos/`.

    The server's file holds the options' numbers, which are accepted as answers too.

    Args:
      root: of all data.
      subset: ask only the questions whose labels are public.
    """

    id_fields = ("question_id", "id", "q_uid")

    def __init__(self, root: Path, subset: bool = True):
        self.name = "egoschema_subset" if subset else "egoschema"
        self._path = find(root, "egoschema", "questions.json")
        self._questions = listed(self._path, read_json(self._path))
        need_all(self._questions, self._path, q_uid=str, question=str, **dict.fromkeys(OPTIONS, str))
        self._golds: Mapping[str, int] = read_json(find(root, "egoschema", "subset_answers.json"))
        if subset:
            self.unscored_ids = frozenset(each["q_uid"] for each in self._questions) - set(self._golds)

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions."""
        return [self._item(each, [each[name] for name in OPTIONS]) for each in self._questions
                if each["q_uid"] not in self.unscored_ids]

    def _item(self, record: Mapping[str, Any], options: list[str]) -> Item:
        key = record["q_uid"]
        return Item(key, choice_prompt(record["question"], options), (video(self._path.parent / "videos", key),),
                    LETTERS[self._golds[key]] if key in self._golds else None, record={**record, "options": options})

    def answer_of(self, value: object) -> object:
        """Returns an answer's text; an option's number becomes its letter, and the number for none no text."""
        if type(value) is int and UNREADABLE <= value < len(OPTIONS):
            return "" if value == UNREADABLE else LETTERS[value]
        return value

    def submission(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Returns the server's file: the option's number by the question's id."""
        letters = {item.id: option_letter(texts[item.id], item.record["options"]) for item in self.items
                   if item.id in texts}
        return {f"{self.name}.json": json.dumps({key: UNREADABLE if letter is None else LETTERS.index(letter)
                                                 for key, letter in letters.items()})}
