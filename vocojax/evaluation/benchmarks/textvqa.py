"""TextVQA, validation: soft accuracy against ten annotators; with or without OCR tokens in the prompt."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import SHORT_ANSWER, Benchmark, Item, Missing
from vocojax.evaluation.benchmarks.files import find, find_optional, listed, need_all, read_json
from vocojax.evaluation.metrics.vqa import textvqa_accuracy
from vocojax.inference.requests import Request

OCR_FILE = "TextVQA_Rosetta_OCR_v0.2_val.json"
OCR_LINE = "\nReference OCR token: "


class TextVqa(Benchmark):
    """`textvqa/TextVQA_0.5.1_val.json`, `textvqa/train_images/`, and Rosetta's OCR tokens for the prompts.

    An answer is found by the question's id; in LLaVA's files the id is the image's, and the prompt tells the question.

    Args:
      root: of all data.
      ocr: put OCR tokens into the prompt, as LLaVA's published figures do.
    """

    missing = Missing(False, "averages over the answers that are there")

    def __init__(self, root: Path, ocr: bool = True):
        self.name = "textvqa" if ocr else "textvqa_no_ocr"
        self.notes = (f"prompts {'with' if ocr else 'without'} OCR tokens",)
        self._path = find(root, "textvqa", "TextVQA_0.5.1_val.json")
        self._questions = listed(self._path, read_json(self._path), "data")
        need_all(self._questions, self._path, question_id=(int, str), image_id=str, question=str)
        self._ocr_path = find_optional(root, "textvqa", OCR_FILE) if ocr else None
        self._needs_ocr = ocr and self._ocr_path is None

    @functools.cached_property
    def items(self) -> list[Item]:
        """The questions."""
        tokens = self._tokens()
        folder = self._path.parent / "train_images"
        return [Item(str(each["question_id"]),
                     _capital(each["question"]) + self._reference(tokens, each) + SHORT_ANSWER,
                     (folder / f"{each['image_id']}.jpg",), each.get("answers"), record=each)
                for each in self._questions]

    def _tokens(self) -> dict[str, list[str]]:
        if self._ocr_path is None:
            return {}
        records = listed(self._ocr_path, read_json(self._ocr_path), "data")
        need_all(records, self._ocr_path, image_id=str, ocr_tokens=list)
        return {each["image_id"]: each["ocr_tokens"] for each in records}

    def _reference(self, tokens: Mapping[str, list[str]], record: Mapping[str, Any]) -> str:
        if self.name != "textvqa":
            return ""
        return OCR_LINE + ", ".join(tokens.get(record["image_id"], []))

    def requests(self, items: Any = None) -> list[Request]:
        """Returns questions as requests; refuses to ask with OCR tokens where their file is missing."""
        if self._needs_ocr:
            raise InputError(f"{self._path.parent / OCR_FILE}: is missing; put it there, or run textvqa_no_ocr")
        return super().requests(items)

    def locate(self, records: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """Finds answers by the question's id, or by the image's id and the question in the prompt."""
        ids = {item.id for item in self.items}
        by_question: dict[tuple[str, str], list[str]] = {}
        for item in self.items:
            by_question.setdefault((item.record["image_id"], item.record["question"].lower()), []).append(item.id)
        found: list[str | None] = []
        for record in records:
            key, prompt = self.identify(record), record.get("prompt")
            if key is not None and key not in ids and isinstance(prompt, str):
                same = by_question.get((key, _asked(prompt)), [])
                # Questions that an image has twice are answered in their order.
                key = (same.pop(0) if len(same) > 1 else same[0]) if same else f"{key} with {_asked(prompt)!r}"
            found.append(key)
        return found

    def official_id(self, item: Item) -> str:
        """Returns the image's id: LLaVA tells questions apart by their prompts."""
        return item.record["image_id"]

    def mark(self, item: Item, text: str, convention: str) -> float:
        """Returns the soft accuracy."""
        return textvqa_accuracy(text, item.gold)


def _capital(question: str) -> str:
    return question[:1].upper() + question[1:]


def _asked(prompt: str) -> str:
    """Returns the question of a prompt, in lower case."""
    first, *rest = prompt.split("\n")
    return (rest[0] if first.startswith(OCR_LINE.strip()) and rest else first).lower()
