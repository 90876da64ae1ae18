"""MME: two yes-or-no questions about each image, in ten tasks of perception and four of cognition."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import LMMS_EVAL, OFFICIAL, SHORT_ANSWER, Benchmark, Item, Missing
from vocojax.evaluation.benchmarks.files import find
from vocojax.evaluation.metrics.yes_no import mme_answer, mme_answer_lmms_eval, mme_score

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
INSTRUCTION = "Please answer yes or no."
IMAGES = (".jpg", ".png", ".jpeg")


class Mme(Benchmark):
    """`mme/MME_Benchmark_release_version/<task>/`, questions beside the images or in folders of their own.

    An item's id is `TASK/IMAGE#NUMBER`. LLaVA's ids name the image only, so an answer is found by its prompt; without
    prompts, the answers about an image are taken in the order of its questions.
    """

    name = "mme"
    conventions = (OFFICIAL, LMMS_EVAL)
    missing = Missing(False, "pairs the lines of an answer file two by two, so that a missing one shifts all others")

    def __init__(self, root: Path):
        self._folder = find(root, "mme", "MME_Benchmark_release_version", ".")

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions, by task."""
        items = [item for task in (*PERCEPTION, *COGNITION) for item in self._task(task)]
        if not items:
            raise InputError(f"{self._folder}: holds none of MME's tasks ({', '.join(PERCEPTION[:3])} ...)")
        absent = {*PERCEPTION, *COGNITION} - {item.kind for item in items}
        if absent:
            self.notes = (*self.notes, f"tasks that are not in {self._folder}: {', '.join(sorted(absent))}")
        return items

    def _task(self, task: str) -> list[Item]:
        folder = self._folder / task
        texts, images = folder / "questions_answers_YN", folder / "images"
        if not texts.is_dir():
            texts = images = folder
        files = {file.stem: file for file in sorted(images.glob("*")) if file.suffix.lower() in IMAGES}
        items = []
        for path in sorted(texts.glob("*.txt")):
            image = files.get(path.stem, images / f"{path.stem}.jpg")
            lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
            for number, line in enumerate(lines, start=1):
                question, _, gold = line.strip().rpartition("\t")
                if gold.lower() not in ("yes", "no"):
                    raise InputError(f"{path}, line {number}: must be QUESTION, a tab, and Yes or No")
                items.append(Item(f"{task}/{image.name}#{number}", _bare(question) + SHORT_ANSWER, (image,),
                                  gold.lower(), task, {"question": question, "file": path.name, "gold": gold}))
        return items

    def locate(self, records: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """Finds the question of each answer by its prompt, or else by its place among the answers about an image."""
        ids = {item.id for item in self.items}
        by_prompt: dict[tuple[str, str], str] = {}
        by_image: dict[str, list[str]] = {}
        for item in self.items:
            image = _image(item.id.partition("#")[0])
            by_prompt[image, _bare(item.record["question"])] = item.id
            by_image.setdefault(image, []).append(item.id)
        seen: dict[str, int] = {}
        found: list[str | None] = []
        for record in records:
            key = self.identify(record)
            if key is None or key in ids:
                found.append(key)
                continue
            prompt, image = record.get("prompt"), _image(key)
            place = seen[image] = seen.get(image, -1) + 1
            asked = by_image.get(image, [])
            if isinstance(prompt, str):
                found.append(by_prompt.get((image, _bare(prompt)), f"{key} with the prompt {_bare(prompt)!r}"))
            else:
                found.append(asked[place] if place < len(asked) else f"{key}, answer {place + 1}")
        return found

    def official_id(self, item: Item) -> str:
        """Returns the image's id: LLaVA tells questions apart by their prompts."""
        return item.id.partition("#")[0]

    def mark(self, item: Item, text: str, convention: str) -> float | None:
        """Returns 1 if the answer reads as the gold answer."""
        said = (mme_answer_lmms_eval if convention == LMMS_EVAL else mme_answer)(text)
        return None if said == "other" else float(said == item.gold)

    def metrics(
        self, items: Sequence[Item], texts: Sequence[str | None], marks: Sequence[float], convention: str
    ) -> dict[str, float]:
        """Returns the points of perception, of cognition, and of both."""
        points = self.by_kind(items, marks)
        perception = sum(points[task] for task in PERCEPTION if task in points)
        cognition = sum(points[task] for task in COGNITION if task in points)
        return {"perception": perception, "cognition": cognition, "total": perception + cognition}

    def by_kind(self, items: Sequence[Item], marks: Sequence[float]) -> dict[str, float]:
        """Returns each task's points, of 200."""
        tasks: dict[str, dict[str, list[bool]]] = {}
        for item, mark in zip(items, marks, strict=True):
            tasks.setdefault(item.kind, {}).setdefault(item.id.partition("#")[0], []).append(mark == 1)
        return {task: mme_score(list(images.values())) for task, images in tasks.items()}

    def submission(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Returns the official tool's files: a line per question with image, question, gold answer and answer."""
        files: dict[str, str] = {}
        for item in self.items:
            if item.id in texts:
                said = texts[item.id].replace("\n", " ").replace("\t", " ")
                line = "\t".join((item.record["file"], item.record["question"], item.record["gold"], said))
                files[f"{item.kind}.txt"] = files.get(f"{item.kind}.txt", "") + line + "\n"
        return files


def _bare(prompt: str) -> str:
    """Returns a question without the instructions around it."""
    return prompt.replace(SHORT_ANSWER.strip(), "").replace(INSTRUCTION, "").strip()


def _image(key: str) -> str:
    """Returns task and stem of an id: folders between them and the suffix differ between files."""
    first, *_, last = key.split("/") if "/" in key else ("", key)
    return f"{first}/{last.rsplit('.', 1)[0]}"
