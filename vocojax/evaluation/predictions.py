"""Files of answers: the official formats and plain jsonl, matched to a benchmark's questions or refused."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import Benchmark
from vocojax.evaluation.benchmarks.files import decoded, numbered_json_lines
from vocojax.evaluation.benchmarks.spreadsheets import read_spreadsheet
from vocojax.evaluation.benchmarks.tables import read_table

FIRST = 3  # offenders that an error names
RECORD_FIELDS = {"question_id", "id", "text", "answer", "pred", "prediction", "prompt"}  # one of them is in a record


@dataclass(frozen=True)
class Predictions:
    """Answers to a benchmark's questions.

    Attributes:
      texts: in the order of the benchmark's items; None for one without an answer.
      notes: what a reader of the score must know.
    """

    texts: tuple[str | None, ...]
    notes: tuple[str, ...] = ()


def read_predictions(path: str | Path, benchmark: Benchmark, allow_missing: bool = False) -> Predictions:
    """Reads answers and matches them to a benchmark's questions.

    Args:
      path: JSON lines, a JSON list of records, a JSON object of answers by id, a table (.tsv, .csv, .xlsx), any of the
        texts packed by gzip (.jsonl.gz), or MME's folder of one table per task. A record has the question's id and the
        answer under the names that the benchmark gives (`id_fields`, `text_fields`), for all of them `question_id` or
        `id`, and `text` or `answer`.
      benchmark: whose questions are answered.
      allow_missing: accept questions without an answer, and treat them as the official tool does.

    Raises:
      InputError: a record is malformed, or ids are duplicate, unknown or missing; names the first and counts them.
    """
    path = Path(path)
    records = read_records(path)
    located = benchmark.locate(records)
    _refuse(path, "without the id of a question", [
        f"record {number}" for number, key in enumerate(located, start=1) if key is None],
        f"a record holds it under {_either(benchmark.id_fields)}")
    name = next((name for name in benchmark.text_fields if any(name in record for record in records)), "")
    answers = [benchmark.answer_of(record.get(name)) for record in records]
    _refuse(path, "whose answer is no text", [
        f"{key!r} ({'none' if answer is None else type(answer).__name__})"
        for key, answer in zip(located, answers, strict=True) if not isinstance(answer, str)],
        f"every record holds a text under {repr(name) if name else _either(benchmark.text_fields)}")
    ids = {item.id: None for item in benchmark.items}
    keys = [str(key) for key in located]
    _refuse(path, f"that are no questions of {benchmark.name}", [
        repr(key) for key in keys if key not in ids and key not in benchmark.unscored_ids],
        "is it the file of another split or another benchmark?")
    counted = Counter(keys)
    _refuse(path, "answered more than once", [repr(key) for key, times in counted.items() if times > 1],
            "keep one answer per question")
    texts = dict(zip(keys, answers, strict=True))
    missing = [key for key in ids if key not in texts]
    treatment = ("counts them as wrong" if benchmark.missing.counted else "leaves them out")
    if not allow_missing:
        _refuse(path, f"of {benchmark.name}'s {len(ids):,} questions without an answer", [repr(key) for key in missing],
                f"the official tool {benchmark.missing.officially}; --allow_missing {treatment}")
    notes = (f"{len(missing):,} questions without an answer: the official tool {benchmark.missing.officially}; this "
             f"score {treatment}",) if missing else ()
    return Predictions(tuple(texts.get(key) for key in ids), notes)  # type: ignore[misc]


def read_records(path: Path) -> list[Mapping[str, Any]]:
    """Reads the records of a file of answers, or of a folder of MME's tables.

    Raises:
      InputError: the file is missing, empty or of no known form.
    """
    if path.is_dir():
        return _mme_records(path)
    if not path.exists():
        raise InputError(f"{path}: is missing")
    records: list[Any] = read_spreadsheet(path) if path.suffix == ".xlsx" else _records_of_text(path)
    if not isinstance(records, list) or not records:
        raise InputError(f"{path}: holds no record of an answer")
    wrong = [f"record {number} ({type(record).__name__})" for number, record in enumerate(records, start=1)
             if not isinstance(record, Mapping)]
    _refuse(path, "that are no JSON objects", wrong, 'a record is {"question_id": ..., "text": ...}')
    return records


def _records_of_text(path: Path) -> Any:
    """Reads the records of a text file, which gzip may have packed."""
    content, kind = _unpacked(path)
    if kind in (".tsv", ".csv"):
        return read_table(path, decoded(path, content), "\t" if kind == ".tsv" else ",", ())
    try:
        document = json.loads(content, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):  # no single document: a record per line, or a line that will be named
        document = None
    if isinstance(document, _Pairs) and not document.keys() & RECORD_FIELDS:  # answers by id
        return [{"id": key, "answer": answer} for key, answer in document.pairs]
    if isinstance(document, list):
        return _without_nesting(document)
    return [record for _, record in numbered_json_lines(path, content)]


def _unpacked(path: Path) -> tuple[bytes, str]:
    """Returns a file's content and its suffix, both without gzip's."""
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content, path.suffix
    try:
        return gzip.decompress(content), path.with_suffix("").suffix
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: gzip can't unpack it: {error}") from error


class _Pairs(dict[str, Any]):
    """A JSON object that also knows the keys that it states twice.

    Attributes:
      pairs: keys and values as they are written.
    """

    def __init__(self, pairs: Sequence[tuple[str, Any]]):
        super().__init__(pairs)
        self.pairs = tuple(pairs)


def _without_nesting(content: Any) -> Any:
    """Returns Video-MME's records: its official file has a record per video with a list of questions."""
    if isinstance(content, list) and content and all(isinstance(one, dict) and "questions" in one for one in content):
        return [question for one in content for question in one["questions"]]
    return content


def _mme_records(folder: Path) -> list[Mapping[str, Any]]:
    """Reads MME's official tables: lines of image, question, gold answer and answer, a file per task."""
    records: list[Mapping[str, Any]] = []
    for path in sorted(folder.glob("*.txt")):
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                cells = line.split("\t")
                if len(cells) != 4:
                    raise InputError(f"{path}, line {number}: must have 4 cells (image, question, gold answer, "
                                     f"answer), got {len(cells)}")
                records.append({"question_id": f"{path.stem}/{cells[0]}", "prompt": cells[1], "text": cells[3]})
    if not records:
        raise InputError(f"{folder}: holds no table of answers (TASK.txt)")
    return records


def _refuse(path: Path, what: str, offenders: Sequence[str], remedy: str) -> None:
    """Raises an error that counts offenders and names the first, if there are any."""
    if offenders:
        more = f" and {len(offenders) - FIRST:,} more" if len(offenders) > FIRST else ""
        raise InputError(f"{path}: {len(offenders):,} {what}: {', '.join(offenders[:FIRST])}{more}; {remedy}")


def _either(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)
