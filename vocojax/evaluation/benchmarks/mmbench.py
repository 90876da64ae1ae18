"""MMBench: multiple choice in every rotation of the options; a question counts if all its rotations are right."""

import base64
import binascii
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import LETTER_ANSWER, Benchmark, Item, Missing
from vocojax.evaluation.benchmarks.files import find
from vocojax.evaluation.benchmarks.spreadsheets import spreadsheet
from vocojax.evaluation.benchmarks.tables import filled, read_table
from vocojax.evaluation.metrics import accuracy_by_kind
from vocojax.evaluation.metrics.choices import LETTERS, mmbench_letter
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.visuals import VisualSource

ROTATION = 1_000_000  # a rotation's index is the question's plus a multiple of this
LETTER_ANSWER_CN = "\n请直接回答选项字母。"


class MmBench(Benchmark):
    """A file of MMBench with the images in base64, `mmbench/mmbench_dev_20230712.tsv` for example.

    Options end at the first empty cell. As pandas reads the official files, cells "None", "NA" and "nan" are empty.

    Args:
      name: of the benchmark.
      root: of all data.
      files: names of the file; the first that is there counts.
      ending: of the prompt, in the file's language.
    """

    sampling = SamplingConfig(max_new_tokens=1024)
    missing = Missing(True, "counts a missing prediction as wrong")
    id_fields = ("question_id", "id", "index")
    text_fields = ("prediction", "text", "answer")
    notes = ("VLMEvalKit's rules without a judge model (exact_matching): answers that its rules can't read are wrong",)

    def __init__(self, name: str, root: Path, files: Sequence[str], ending: str = LETTER_ANSWER):
        self.name = name
        self._ending = ending
        self._path = find(root, "mmbench", *files)
        self._rows = read_table(self._path, self._path.read_text(encoding="utf-8"), "\t",
                                ("index", "question", "A", "B"))

    @functools.cached_property
    def items(self) -> list[Item]:
        """Every rotation of every question."""
        return [self._item(row, number) for number, row in enumerate(self._rows)]

    @functools.cached_property
    def _row_of(self) -> dict[str, Mapping[str, str]]:
        return {row["index"]: row for row in self._rows}

    def _item(self, row: Mapping[str, str], number: int) -> Item:
        if not row["index"].isdecimal():
            raise InputError(f"{self._path}, record {number}: 'index' must be a whole number, got {row['index']!r}")
        hint = filled(row, "hint")
        options = _options_until_empty(row)
        prompt = "\n".join([*([hint] if hint else []), row["question"],
                            *(f"{letter}. {option}" for letter, option in options.items())])
        return Item(row["index"], prompt + self._ending, (row["index"],), filled(row, "answer"),
                    filled(row, "category") or "", row)

    def visual(self, source: VisualSource) -> VisualSource:
        """Decodes the image of a row; a short cell names the row that holds it."""
        cell = self._row_of[str(source)].get("image", "")
        if len(cell) < 64 and cell in self._row_of:
            cell = self._row_of[cell]["image"]
        try:
            return Image.open(io.BytesIO(base64.b64decode(cell)))
        except (OSError, binascii.Error) as error:
            raise InputError(f"{self._path}, index {source!s}: its image can't be read: {error}") from error

    def mark(self, item: Item, text: str, convention: str) -> float | None:
        """Returns 1 if the letter that the answer chooses is right; of one rotation."""
        options = {letter: option for letter in LETTERS if (option := filled(item.record, letter)) is not None}
        letter = mmbench_letter(text, options)
        return None if letter is None else float(letter == item.gold)

    def metrics(
        self, items: Sequence[Item], texts: Sequence[str | None], marks: Sequence[float], convention: str
    ) -> dict[str, float]:
        """Returns circular accuracy, by split where the file has several, and the accuracy of single rotations."""
        hits = _hits(items, marks)
        splits = accuracy_by_kind(list(hits.values()), [self._row_of[key].get("split", "") for key in hits])
        named = {f"circular accuracy, {split}": 100 * mean for split, mean in splits.items()} if len(splits) > 1 else {}
        return {"circular accuracy": 100 * sum(hits.values()) / len(hits), **named,
                "accuracy of rotations": 100 * sum(marks) / len(marks)}

    def by_kind(self, items: Sequence[Item], marks: Sequence[float]) -> dict[str, float]:
        """Returns circular accuracy by category and by coarse category."""
        hits = _hits(items, marks)
        found: dict[str, float] = {}
        for column in ("l2-category", "category"):
            kinds = [self._row_of[key].get(column, "") for key in hits]
            if any(kinds):
                found |= {kind: 100 * mean for kind, mean in accuracy_by_kind(list(hits.values()), kinds).items()}
        return found

    def official_id(self, item: Item) -> int:
        """Returns the id as a number."""
        return int(item.id)

    def submission(self, texts: Mapping[str, str]) -> dict[str, bytes]:
        """Returns the table that the server takes."""
        dropped = ("hint", "category", "source", "image", "comment", "l2-category")
        columns = [column for column in self._rows[0] if column not in dropped]
        columns.insert(6, "prediction")
        rows: list[list[str | int]] = []
        for row in self._rows:
            cells = {**row, "prediction": texts.get(row["index"], "")}
            rows.append([int(cells[name]) if name == "index" else cells.get(name, "") for name in columns])
        return {f"{self.name}.xlsx": spreadsheet(columns, rows)}


def _options_until_empty(row: Mapping[str, str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for letter in LETTERS:
        option = filled(row, letter)
        if option is None or option.lower() in ("nan", "none"):
            break
        options[letter] = option
    return options


def _hits(items: Sequence[Item], marks: Sequence[float]) -> dict[str, float]:
    """Returns by question whether every rotation is right; questions whose first rotation is not there are left out."""
    groups: dict[int, list[float]] = {}
    for item, mark in zip(items, marks, strict=True):
        groups.setdefault(int(item.id) % ROTATION, []).append(mark)
    return {item.id: float(all(groups[int(item.id)])) for item in items if int(item.id) < ROTATION}
