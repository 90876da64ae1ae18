"""The tables of `vocojax evaluate`: the flags --table, --row, --upper, --lower and --figures."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

if TYPE_CHECKING:
    from vocojax.evaluation.benchmarks.base import Benchmark, Result
    from vocojax.evaluation.running import Asking
    from vocojax.evaluation.tables.asking import Load, RowAnswers
    from vocojax.evaluation.tables.layouts import Layout
    from vocojax.evaluation.tables.page import Answered
    from vocojax.evaluation.tables.rows import RowSource
    from vocojax.evaluation.tables.table import Row

FLAGS = flags.FLAGS
Score = Callable[["Benchmark", Sequence[str], Path, str], "Result | None"]


def check_flags() -> None:
    """Raises `UsageError` unless the flags of a table go together."""
    from vocojax.evaluation.tables.layouts import LAYOUTS

    if FLAGS.table not in LAYOUTS:
        raise app.UsageError(f"--table must be one of {', '.join(LAYOUTS)}, got {FLAGS.table!r}")
    if FLAGS.checkpoint or FLAGS.predictions or FLAGS.vocos or FLAGS.visibility:
        raise app.UsageError("--table takes its models from --upper, --row and --lower; leave out --checkpoint, "
                             "--predictions, --vocos and --visibility")
    if not FLAGS.output:
        raise app.UsageError("--table needs --output, the directory for answers and tables")
    if not (FLAGS.row or FLAGS.upper or FLAGS.lower or FLAGS.figures):
        raise app.UsageError("--table needs rows: --upper=CHECKPOINT, --row='NAME=CHECKPOINT', or --figures=FILE")


def make_table(score: Score) -> None:
    """Answers and scores the rows of --table, prints it and writes it to OUTPUT/TABLE.{md,tex,json,html}.

    Args:
      score: writes and returns the score of a model's answers in a directory; None where labels are hidden.

    Raises:
      InputError: rows failed. The table is written, and names them.
    """
    from vocojax.evaluation.benchmarks import registry
    from vocojax.evaluation.running import PATIENCE
    from vocojax.evaluation.tables.asking import answer_row
    from vocojax.evaluation.tables.layouts import layout_of
    from vocojax.evaluation.tables.rows import read_rows
    from vocojax.parallel import cluster, processes

    given_names = {registry.result_name(name): name for name in registry.expand(FLAGS.benchmarks)}
    layout = layout_of(FLAGS.table, list(given_names))
    sources = read_rows(FLAGS.row, FLAGS.upper, FLAGS.lower)
    given = _given_figures()
    names = list(dict.fromkeys(column.benchmark for column in layout.columns)) if sources else []
    benchmarks = [registry.open_benchmark(given_names.get(name, name), FLAGS.data_root) for name in names]
    cluster.initialize(cluster.find_cluster(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id))
    load, found = _loader(), []
    for source in sources:
        directory = Path(FLAGS.output) / source.folder
        answers = answer_row(source, benchmarks, directory, _asking(source), load)
        scores: dict[str, Result] = {}
        processes.wait_for_first(f"scores of {source.name}", functools.partial(
            _score_row, score, benchmarks, answers, directory, scores), PATIENCE)
        found.append((source, answers, scores))
    processes.wait_for_first("table", lambda: _write(layout, benchmarks, found, given), PATIENCE)


def _asking(source: "RowSource") -> "Asking":
    from vocojax.evaluation.running import Asking
    from vocojax.inference.caches.store import Store

    store = Store(FLAGS.store) if FLAGS.store else None
    return Asking(Path(source.checkpoint).name, FLAGS.batch_size, source.vocos, FLAGS.limit, store)


def _loader() -> "Load":
    """Returns a function that loads a row's model, and keeps the last one for rows that read it with fewer tokens."""
    from vocojax.inference.assistant import Assistant
    from vocojax.parallel.mesh import parse_mesh

    @functools.lru_cache(maxsize=1)
    def load(checkpoint: str, visibility: Any) -> Assistant:
        return Assistant.from_pretrained(checkpoint, visibility=visibility, mesh=parse_mesh(FLAGS.mesh),
                                         dtype=FLAGS.dtype)

    return lambda row: load(row.checkpoint, row.visibility)


def _score_row(
    score: Score, benchmarks: "Sequence[Benchmark]", answers: "RowAnswers", directory: Path, scores: "dict[str, Result]"
) -> None:
    """Adds a row's scores to `scores`, and what can't be scored to its problems."""
    from vocojax.errors import VocojaxError, first_line
    from vocojax.evaluation.benchmarks.base import OFFICIAL

    for benchmark in benchmarks:
        if benchmark.name in answers.texts:
            convention = FLAGS.convention if FLAGS.convention in benchmark.conventions else OFFICIAL
            try:
                result = score(benchmark, answers.texts[benchmark.name], directory / benchmark.name, convention)
            except (VocojaxError, OSError) as error:
                answers.problems[benchmark.name] = first_line(error)
            else:
                scores |= {} if result is None else {benchmark.name: result}


def _write(
    layout: "Layout", benchmarks: "Sequence[Benchmark]",
    found: "Sequence[tuple[RowSource, RowAnswers, Mapping[str, Result]]]", given: Mapping[str, Any],
) -> None:
    """Writes and prints the table; raises `InputError` if rows failed."""
    from vocojax.errors import InputError
    from vocojax.evaluation.tables.page import write_page
    from vocojax.evaluation.tables.table import Table, with_given
    from vocojax.evaluation.tables.writing import latex, markdown
    from vocojax.files import write_atomically

    rows = tuple(_row(layout, source, answers, scores) for source, answers, scores in found)
    conventions = {name: result.convention for _, _, scores in found for name, result in scores.items()}
    table = Table(layout, with_given(rows, layout, given, FLAGS.figures or ""), _notes(found), conventions)
    content = json.dumps(table.as_json(), indent=2, ensure_ascii=False) + "\n"
    output = Path(FLAGS.output)
    for suffix, text in (("md", markdown(table)), ("tex", latex(table)), ("json", content)):
        write_atomically(output / f"{layout.name}.{suffix}", text)
    if FLAGS.json:
        write_atomically(FLAGS.json, content)
    write_page(output / f"{layout.name}.html", table, _answered(benchmarks, found))
    print(markdown(table))
    print(f"written: {output / layout.name}.md, .tex, .json and .html")
    if failed := [row for row in table.rows if row.problems]:
        name, problem = failed[0].problems[0]
        raise InputError(f"{len(failed)} of {len(table.rows)} rows failed, the first is {failed[0].name} on {name}: "
                         f"{problem}; the table is written without these figures; run the same command to resume")


def _row(layout: "Layout", source: "RowSource", answers: "RowAnswers", scores: "Mapping[str, Result]") -> "Row":
    from vocojax.evaluation.tables.table import Row

    figures: dict[str, float] = {}
    for column in layout.columns:
        if column.benchmark in scores:
            metrics = scores[column.benchmark].metrics
            name = column.metric or next(iter(metrics))
            figures |= {column.title: metrics[name]} if name in metrics else {}
    return Row(source.name, figures, answers.tokens, source.checkpoint, tuple(answers.problems.items()))


def _notes(found: "Sequence[tuple[RowSource, RowAnswers, Mapping[str, Result]]]") -> tuple[str, ...]:
    """Returns what a reader must know: the limit, given figures, and the benchmarks' own notes, each once."""
    notes = dict.fromkeys(f"{name}: {note}" for _, _, scores in found for name, result in scores.items()
                          for note in result.notes)
    reported = []
    if FLAGS.limit:
        reported.append(f"the first {FLAGS.limit:,} questions of each benchmark only")
    if FLAGS.figures:
        reported.append(f"figures from {FLAGS.figures} are as they were given")
    return (*reported, *notes)


def _answered(
    benchmarks: "Sequence[Benchmark]", found: "Sequence[tuple[RowSource, RowAnswers, Mapping[str, Result]]]"
) -> "list[Answered]":
    from vocojax.evaluation.running import asked_items
    from vocojax.evaluation.tables.page import Answered

    answered = []
    for benchmark in benchmarks:
        own = [(source.name, answers.texts[benchmark.name], scores[benchmark.name].marks)
               for source, answers, scores in found if benchmark.name in scores]
        if own:
            answered.append(Answered(benchmark, asked_items(benchmark, FLAGS.limit),
                                     {name: texts for name, texts, _ in own}, {name: marks for name, _, marks in own}))
    return answered


def _given_figures() -> Mapping[str, Any]:
    """Returns the content of --figures; {} without it."""
    from vocojax.errors import InputError
    from vocojax.evaluation.benchmarks.files import read_json

    if not FLAGS.figures:
        return {}
    content = read_json(Path(FLAGS.figures))
    if not isinstance(content, dict):
        raise InputError(f'{FLAGS.figures}: must be {{"ROW": {{"BENCHMARK": figure}}}}, got {type(content).__name__}')
    return content
