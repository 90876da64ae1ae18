"""Answers a benchmark's questions with a model: in batches, shared by processes, resumed after a kill."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from vocojax.data.images import ImageError
from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import Benchmark, Item
from vocojax.files import is_remote, json_line, parse_json, write_atomically
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.caches.store import Store
from vocojax.inference.many import answer_many
from vocojax.inference.requests import Answer, Request
from vocojax.inference.visuals import VisualSource
from vocojax.parallel import processes

PARTS = "parts"  # folder of the answers so far, a file per process
RUN = "run.json"
ANSWERS = "answers.jsonl"
PATIENCE = 7 * 24 * 3600.0  # seconds that a process waits for slower ones
FIRST = 3  # questions that an error names


@dataclass(frozen=True)
class Asking:
    """How a benchmark is asked.

    Attributes:
      model: name of the model in answer files.
      batch_size: questions that are answered at once.
      num_vocos: how many VoCo tokens of each unit are read; None for all.
      limit: ask the first `limit` questions only; None for all.
      store: where caches of visuals are sought and put; None keeps none on disk.
    """

    model: str
    batch_size: int = 32
    num_vocos: int | None = None
    limit: int | None = None
    store: Store | None = None


def asked_items(benchmark: Benchmark, limit: int | None) -> Sequence[Item]:
    """Returns the questions that are asked: the first `limit`, or all."""
    return benchmark.items if limit is None else benchmark.items[:limit]


def answer_benchmark(assistant: Assistant, benchmark: Benchmark, directory: Path, asking: Asking) -> list[str]:
    """Answers a benchmark's questions and writes `DIRECTORY/answers.jsonl`, in the official answer format.

    Answers are appended to `DIRECTORY/parts` batch by batch. A run that was killed resumes there and asks no question
    again, also with another number of processes or another batch size. Visuals are compressed once, however many
    questions are about them. Several processes share the directory and the questions.

    Args:
      assistant: answers, with this process's devices.
      benchmark: is asked.
      directory: of this model's answers to this benchmark, local or on a shared disk.
      asking: how.

    Returns:
      The answers to `asked_items`, in their order; complete on all processes.

    Raises:
      InputError: the directory holds the answers of another model, or a question can't be answered.
    """
    if is_remote(directory):
        raise InputError(f"{directory}: answers are appended as they come; name a local directory")
    items = asked_items(benchmark, asking.limit)
    _claim(directory, {
        "benchmark": benchmark.name, "model": assistant.fingerprint.digest, "visibility": assistant.visibility,
        "vocos": asking.num_vocos})
    index, count = jax.process_index(), jax.process_count()
    prompts = {item.id: benchmark.prompt(item) for item in items}
    known = _read_parts(directory, prompts)
    own = [item for item in _share(items, index, count) if item.id not in known]
    failed: list[str] = []
    with _Log(directory / PARTS / f"{index}.jsonl") as log, tqdm(
        total=len(own), desc=benchmark.name, unit="question", disable=not own
    ) as bar:
        for batch, answers in _answers(assistant, benchmark, own, asking):
            log.append([{"id": item.id, "prompt": benchmark.prompt(item), "text": answer.text.strip()}
                        for item, answer in zip(batch, answers, strict=True) if not answer.error])
            failed += [f"{item.id!r} ({answer.error})" for item, answer in zip(batch, answers, strict=True)
                       if answer.error]
            bar.update(len(batch))
    everywhere = processes.from_all(f"answers to {benchmark.name}", failed, PATIENCE)
    failed = [each for failures in everywhere for each in failures]
    if failed:
        more = f" and {len(failed) - FIRST:,} more" if len(failed) > FIRST else ""
        raise InputError(f"{benchmark.name}: {len(failed):,} questions could not be answered: "
                         f"{', '.join(failed[:FIRST])}{more}; mend them and run the same command to resume")
    known = _read_parts(directory, prompts)
    missing = [item.id for item in items if item.id not in known]
    if missing:
        raise InputError(f"{directory / PARTS}: lacks {len(missing):,} answers of other processes; --output must be a "
                         "directory that all hosts share")
    texts = [known[item.id] for item in items]
    if processes.is_first():
        write_atomically(directory / ANSWERS, answer_file(benchmark, items, texts, asking.model))
    return texts


def stored_answers(benchmark: Benchmark, directory: Path, limit: int | None) -> list[str] | None:
    """Returns the answers of an earlier run to `asked_items`; None unless all are there.

    Raises:
      InputError: a stored line is no answer, or answers another prompt.
    """
    items = asked_items(benchmark, limit)
    known = _read_parts(directory, {item.id: benchmark.prompt(item) for item in items})
    return [known[item.id] for item in items] if all(item.id in known for item in items) else None


def answer_file(benchmark: Benchmark, items: Sequence[Item], texts: Sequence[str], model: str) -> str:
    """Returns answers in LLaVA's format, one JSON object per line."""
    return "".join(json_line({
        "question_id": benchmark.official_id(item), "prompt": benchmark.prompt(item), "text": text,
        "answer_id": hashlib.sha256(f"{model} {item.id}".encode()).hexdigest()[:22], "model_id": model, "metadata": {},
    }) + "\n" for item, text in zip(items, texts, strict=True))


def write_submission(benchmark: Benchmark, items: Sequence[Item], texts: Sequence[str], directory: Path) -> list[Path]:
    """Writes the files that the benchmark's server or tool takes, and returns their paths."""
    files = benchmark.submission({item.id: text for item, text in zip(items, texts, strict=True)})
    for name, content in files.items():
        write_atomically(directory / "submission" / name, content)
    return [directory / "submission" / name for name in files]


def _answers(
    assistant: Assistant, benchmark: Benchmark, items: Sequence[Item], asking: Asking
) -> Iterator[tuple[Sequence[Item], list[Answer]]]:
    """Yields batches of questions with their answers. Questions about the same visuals follow one another."""
    caches: dict[VisualSource, VocoCache] = {}
    for first in range(0, len(items), asking.batch_size):
        batch = items[first : first + asking.batch_size]
        requests = benchmark.requests(batch)
        if assistant.reads_caches:
            caches = _caches(assistant, batch, requests, caches, asking.store)
            requests = [
                dataclasses.replace(request, visuals=tuple(
                    caches.get(name, source) for name, source in zip(item.visuals, request.visuals, strict=True)))
                for item, request in zip(batch, requests, strict=True)]
        yield batch, list(answer_many(assistant, requests, batch_size=asking.batch_size, num_vocos=asking.num_vocos,
                                      progress=None))


def _caches(
    assistant: Assistant, items: Sequence[Item], requests: Sequence[Request], before: Mapping[VisualSource, VocoCache],
    store: Store | None,
) -> dict[VisualSource, VocoCache]:
    """Returns the caches of a batch's visuals, of which those of the batch before may be some.

    A visual that can't be read has none: `answer_many` reports it.
    """
    sources = {name: source for item, request in zip(items, requests, strict=True)
               for name, source in zip(item.visuals, request.visuals, strict=True)}
    prepared = {}
    for name, source in sources.items():
        if name not in before:
            try:
                prepared[name] = assistant.visual(source)  # type: ignore[arg-type]
            except ImageError:
                continue
    new = dict(zip(prepared, assistant.caches_of(list(prepared.values()), store), strict=True)) if prepared else {}
    return {name: new.get(name) or before[name] for name in sources if name in new or name in before}


def _share(items: Sequence[Item], index: int, count: int) -> list[Item]:
    """Returns one process's questions: every `count`-th group of questions about the same visuals."""
    groups: dict[tuple[VisualSource, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(item.visuals, []).append(item)
    return [item for group in list(groups.values())[index::count] for item in group]


def _claim(directory: Path, run: Mapping[str, Any]) -> None:
    """Writes what a directory's answers are of, or compares it with what is written there."""
    path = directory / RUN
    if not path.exists():
        if processes.is_first():
            write_atomically(path, json.dumps(run, indent=2) + "\n")
        return
    try:
        there = parse_json(path.read_bytes())
        odd = [f"{name} is {there.get(name)!r} there, {value!r} here" for name, value in run.items()
               if there.get(name) != value]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: is damaged ({error}); name another --output") from None
    if odd:
        raise InputError(f"{path}: holds the answers of another run ({'; '.join(odd)}); name another --output")


def _read_parts(directory: Path, prompts: Mapping[str, str]) -> dict[str, str]:
    """Returns the answers so far by the questions' ids; a line that a kill has torn is none.

    Args:
      directory: of the answers.
      prompts: the questions' prompts by their ids, which must be those that were answered.
    """
    found: dict[str, str] = {}
    for path in sorted((directory / PARTS).glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # after the last newline there is nothing, or a torn line
            try:
                record = parse_json(line)
                key, prompt, text = record["id"], record["prompt"], record["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number}: is no answer; remove the file to ask its questions again"
                                 ) from error
            if key in prompts and prompts[key] != prompt:
                raise InputError(f"{path}, line {number}: answers another prompt to the question {key!r}; name another "
                                 "--output")
            found[key] = text
    return found


class _Log:
    """A file that answers are appended to; a batch is on the disk when `append` returns."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends records, each a line of JSON."""
        self._file.write(b"".join(json_line(each).encode() + b"\n" for each in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
