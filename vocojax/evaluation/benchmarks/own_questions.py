"""Questions of your own: a JSON or JSON-lines file that has the right answers too."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vocojax.data.sources.base import Root
from vocojax.data.sources.llava import sample_from_llava
from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import Benchmark, Item
from vocojax.evaluation.benchmarks.files import listed, read_json, read_json_lines
from vocojax.evaluation.metrics import exact_match
from vocojax.evaluation.metrics.vqa import vqa_answer
from vocojax.layout import LayoutError

CLEANED = "accuracy, cleaned as VQAv2 does"


class OwnQuestions(Benchmark):
    """The questions of one file, each marked 1 or 0.

    A record is `{"image": path or [paths], "question": text, "answer": text or [texts]}`, where any of several answers
    is right; `id` and `kind` (scores are broken down by it) may be left out. Records of LLaVA's form with one question
    each are read as well, so that held-out data of a training can be asked. The name of the benchmark is that of the
    file without its suffix.

    Args:
      path: a `.json` with a list of records, or a `.jsonl` with one per line.
      root: directory that the records' image paths are relative to.

    Raises:
      InputError: names the file, the record and what is wrong with it.
    """

    notes = (f"accuracy counts answers that are equal apart from case, white space and a final period; {CLEANED!r}, "
             "also apart from articles, punctuation and how numbers are written",)

    def __init__(self, path: Path, root: Path):
        self.name = path.stem
        self._path, self._root = path, Root(root)
        if not path.is_file():
            raise InputError(f"{path}: there is no such file of questions")
        self._records = listed(path, read_json_lines(path) if path.suffix == ".jsonl" else read_json(path))

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions; a record without an `id` has its number in the file, from 0."""
        items = [self._item(number, record) for number, record in enumerate(self._records)]
        identifier, times = Counter(item.id for item in items).most_common(1)[0]
        if times > 1:
            raise InputError(f"{self._path}: the id {identifier!r} is there {times} times; make ids unique, or leave "
                             "them out to have the records numbered")
        return items

    def mark(self, item: Item, text: str, convention: str) -> float:
        """Returns 1 for an exact match with one of the right answers."""
        return float(any(exact_match(text, answer) for answer in item.gold))

    def metrics(
        self, items: Sequence[Item], texts: Sequence[str | None], marks: Sequence[float], convention: str
    ) -> Mapping[str, float]:
        """Returns accuracy by exact match, and by equality after VQAv2's cleaning of both sides."""
        right = [text is not None and vqa_answer(text) in map(vqa_answer, item.gold)
                 for item, text in zip(items, texts, strict=True)]
        return {**super().metrics(items, texts, marks, convention), CLEANED: 100 * sum(right) / len(right)}

    def _item(self, number: int, record: Mapping[str, Any]) -> Item:
        where = f"{self._path}, record {number}"
        answers = [record["answer"]] if isinstance(record.get("answer"), str) else record.get("answer")
        if "question" in record:
            record = {"id": number, **record, "conversations": [{"from": "human", "value": record["question"]}]}
        try:
            sample = sample_from_llava(record, number, self._root)
        except LayoutError as error:
            raise InputError(f"{where}: {error}") from None
        turns = sample.threads[0]
        if [turn.role for turn in turns] not in (["user"], ["user", "assistant"]) or sample.videos:
            raise InputError(f"{where}: must be one question about images, with its answer; write one record per "
                             "question, without a system turn or a video")
        if answers is None and len(turns) == 2:
            answers = [turns[1].text]
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise InputError(f"{where}: must have 'answer', a text or a list of texts that are right")
        return Item(str(record.get("id", number)), turns[0].text, sample.images, answers, str(record.get("kind", "")),
                    record)
