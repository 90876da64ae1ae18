"""Answers of a table's rows: from what is stored, or from the row's model, loaded only if something is missing.

    OUTPUT/ROW/BENCHMARK/answers.jsonl, parts/, run.json   as `evaluation.running` writes them
                         source.json                       the weights that answered, see `_source`
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vocojax.errors import VocojaxError, first_line
from vocojax.evaluation.benchmarks.base import Benchmark
from vocojax.evaluation.running import PATIENCE, Asking, answer_benchmark, stored_answers
from vocojax.evaluation.tables.rows import RowSource
from vocojax.files import files_below, is_remote, parse_json, write_atomically
from vocojax.inference.assistant import Assistant
from vocojax.parallel import processes

SOURCE = "source.json"
Load = Callable[[RowSource], Assistant]


@dataclass
class RowAnswers:
    """A row's answers.

    Attributes:
      texts: by the benchmark's name, in the order of the questions that were asked.
      problems: by the benchmark's name, why there are no answers.
      tokens: of one image that text reads; None where no benchmark was answered.
    """

    texts: dict[str, Sequence[str]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    tokens: int | None = None


def answer_row(
    row: RowSource, benchmarks: Sequence[Benchmark], directory: Path, asking: Asking, load: Load
) -> RowAnswers:
    """Returns a row's answers to benchmarks; all processes call it alike.

    Stored answers are taken as they are if they are complete and the weights' files have not changed since, or are no
    longer there. Else the model is loaded, and `answer_benchmark` resumes or refuses what is stored. A failure is
    reported in the result: it ends neither the row nor the table.

    Args:
      row: whose weights answer.
      benchmarks: are asked.
      directory: of the row's answers, a folder per benchmark.
      asking: how; `num_vocos` is the row's.
      load: makes the row's assistant.
    """
    answers, source = RowAnswers(), _source(row)
    complete = {each.name: _stored(directory / each.name, each, asking.limit, source) for each in benchmarks}
    waiting = processes.from_first(f"answers of {row.name}", [name for name, it in complete.items() if it is None])
    assistant, problem = None, ""
    if waiting:
        try:
            assistant = load(row)
        except (VocojaxError, OSError) as error:
            problem = first_line(error)
        problem = next(filter(None, processes.from_all(f"model of {row.name}", problem, PATIENCE)), "")
    for benchmark in benchmarks:
        folder = directory / benchmark.name
        try:
            if benchmark.name not in waiting:
                answers.texts[benchmark.name], answers.tokens = complete[benchmark.name] or ((), None)
            elif problem or assistant is None:
                answers.problems[benchmark.name] = problem
            else:
                answers.texts[benchmark.name] = answer_benchmark(assistant, benchmark, folder, asking)
                answers.tokens = tokens_read(assistant, row.vocos)
                if processes.is_first():
                    found = {**source, "tokens": answers.tokens}
                    write_atomically(folder / SOURCE, json.dumps(found, indent=2) + "\n")
        except (VocojaxError, OSError) as error:
            answers.problems[benchmark.name] = first_line(error)
    return answers


def tokens_read(assistant: Assistant, vocos: int | None) -> int:
    """Returns how many tokens of one unit the text reads: VoCo tokens, all vision tokens, or a baseline's."""
    unit = assistant.processor.unit
    return (vocos or unit.vocos) if assistant.reads_caches else unit.tokens


def _source(row: RowSource) -> dict[str, Any]:
    """Returns what tells a row's weights and reading from others': `modified` is the time of the newest local file."""
    modified = None
    if not is_remote(row.checkpoint) and Path(row.checkpoint).is_dir():
        times = [(Path(row.checkpoint) / name).stat().st_mtime_ns for name in files_below(row.checkpoint)]
        modified = max(times, default=None)
    return {"checkpoint": row.checkpoint, "vocos": row.vocos, "visibility": row.visibility, "modified": modified}


def _stored(
    directory: Path, benchmark: Benchmark, limit: int | None, source: Mapping[str, Any]
) -> tuple[Sequence[str], int | None] | None:
    """Returns complete answers of the same weights and the tokens they read; None if there are none."""
    try:
        there = parse_json((directory / SOURCE).read_bytes())
        if any(there[key] != value for key, value in source.items() if key != "modified" or value is not None):
            return None
        texts = stored_answers(benchmark, directory, limit)
    except (OSError, ValueError, KeyError, TypeError, VocojaxError):
        return None  # the model is loaded, and says what is wrong
    return None if texts is None else (texts, there.get("tokens"))
