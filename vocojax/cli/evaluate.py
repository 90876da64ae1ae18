"""Answers benchmarks with one model or several and scores them, or scores a file of answers.

    vocojax evaluate --benchmarks=pope,gqa --data_root=data --checkpoint=runs/voco --output=results
    vocojax evaluate --benchmarks=pope --data_root=data --predictions=answers.jsonl
    vocojax evaluate --benchmarks=questions.json --data_root=images --checkpoint=runs/mine --output=results
    vocojax evaluate --table=table1 --data_root=data --output=results --upper=runs/upper --row='VoCo-1=runs/voco_1' \\
        --row='Avg. Pool + Linear=runs/pool' --row='Q-Former=runs/qformer'

The third command asks questions of your own: records {"image": PATH, "question": TEXT, "answer": TEXT or [TEXTS]}, or
records of LLaVA's form with one question each, in a .json or .jsonl; image paths are below --data_root.

The fourth command makes a table of the paper, with what each model keeps of the upper bound: OUTPUT/table1.md, .tex,
.json, and .html with the questions on which the models differ most. The lower bound is the upper bound's weights read
through the VoCo mask. For tables 2, 3, 6 and 8 give the models as rows; for table 4, --row='VoCo-8=RUN,vocos=8/4/2/1'
reads one model with fewer tokens. A table is made again from the stored answers without a model.

Run the same command after an interruption: questions that are answered are not asked again. Scores are those of each
benchmark's official script; --convention=lmms-eval scores as lmms-eval does where it differs. On several hosts the same
command runs on each, with an --output that all of them share. --list names the benchmarks.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

from vocojax.cli import comparison
from vocojax.cli.flag_checks import refuse_arguments, refuse_empty, require_writable
from vocojax.cli.program_cache import keep_programs

if TYPE_CHECKING:
    from vocojax.evaluation.benchmarks.base import Benchmark, Item, Result

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list("benchmarks", [], "Benchmarks, groups of them (table1, rec, reg, video) or files of your own "
                      "questions (.json, .jsonl), separated by commas.")
    flags.DEFINE_bool("list", False, "Name the benchmarks and exit.")
    flags.DEFINE_string("data_root", "data", "Directory of the official files, a folder per benchmark; for your own "
                        "questions, of the images.")
    flags.DEFINE_string("checkpoint", None, "Weights in any layout, or a run of training.")
    flags.DEFINE_string("output", None, "Directory for answers and scores, a folder per benchmark.")
    flags.DEFINE_string("table", None, "Table of the paper to make: table1 to table6 or table8. --benchmarks, if "
                        "given, replace the table's own.")
    flags.DEFINE_multi_string("row", [], "A row of the table, NAME=CHECKPOINT[,vocos=N][,visibility=voco|causal]; "
                              "repeat the flag for each. vocos=8/4/2/1 makes a row of each number of tokens read.")
    flags.DEFINE_string("upper", None, "CHECKPOINT of the table's upper bound, which is read with all vision tokens.")
    flags.DEFINE_string("lower", None, "CHECKPOINT of the lower bound, which is read through the VoCo mask; default: "
                        "the upper bound's.")
    flags.DEFINE_string("figures", None, 'JSON file {"ROW": {"BENCHMARK": figure}} of figures from elsewhere: of a '
                        "benchmark's server, or of a paper. They fill the table's rows, or add some.")
    flags.DEFINE_string("predictions", None, "File of answers to score, in place of a model.")
    flags.DEFINE_bool("allow_missing", False, "Accept questions without an answer, as the official tool treats them.")
    flags.DEFINE_string("convention", "official", "Definition of the scores: official, llava or lmms-eval.")
    flags.DEFINE_integer("limit", None, "Ask only the first LIMIT questions of each benchmark.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Questions that are answered at once.", lower_bound=1)
    flags.DEFINE_integer("vocos", None, "Number of each image's VoCo tokens to read; default: all.", lower_bound=1)
    flags.DEFINE_enum("visibility", None, ["voco", "causal"], "Who sees whom; default: as trained. A lower bound is an "
                      "upper bound read with voco.")
    flags.DEFINE_string("store", None, "Directory for caches of images, to use them again; default: none is kept.")
    flags.DEFINE_string("judge", None, "Judge of open-ended video answers: URL of an OpenAI-compatible endpoint (its "
                        "key is read from OPENAI_API_KEY), a model's directory, or 'stored' to read stored replies.")
    flags.DEFINE_string("judge_model", "gpt-3.5-turbo", "Name of the judge, and of the model that its endpoint runs.")
    flags.DEFINE_string("judge_replies", None, "File of the judge's replies; default: OUTPUT/BENCHMARK/judge.jsonl.")
    flags.DEFINE_integer("judge_threads", 8, "Answers that the judge's endpoint reads at once.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Dtype of the model; default: as stored.")
    flags.DEFINE_string("mesh", None, "DATA,FSDP,TENSOR over this process's devices (-1 for the rest); default: one.")
    flags.DEFINE_string("json", None, "File to write the scores to.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where it is not detected.")
    flags.DEFINE_integer("num_processes", None, "Number of processes, where it is not detected.")
    flags.DEFINE_integer("process_id", None, "Number of this process, where it is not detected.")
    refuse_empty("data_root", "checkpoint", "output", "table", "upper", "lower", "figures", "predictions", "store",
                 "judge")
    require_writable("json")


def main(arguments: Sequence[str]) -> None:
    """Evaluates."""
    refuse_arguments(arguments)
    if not FLAGS.list:
        _check()
    from vocojax.evaluation.benchmarks import registry

    if FLAGS.list:
        print(registry.described())
        return
    if FLAGS.table:
        comparison.make_table(_score)
        return
    names = registry.expand(FLAGS.benchmarks)
    if FLAGS.predictions and len(names) > 1:
        raise app.UsageError(f"--predictions holds the answers to one benchmark, got {', '.join(names)}")
    benchmarks = [registry.open_benchmark(name, FLAGS.data_root) for name in names]
    results = [_score_file(benchmarks[0])] if FLAGS.predictions else _ask(benchmarks)
    if FLAGS.json and results:
        scores = json.dumps([result.as_json() for result in results], indent=2, ensure_ascii=False)
        Path(FLAGS.json).write_text(scores + "\n", encoding="utf-8")


def _check() -> None:
    if FLAGS.table:
        comparison.check_flags()
        return
    if FLAGS.row or FLAGS.upper or FLAGS.lower or FLAGS.figures:
        raise app.UsageError("--row, --upper, --lower and --figures are of a table; name it, such as --table=table1")
    if not FLAGS.benchmarks:
        raise app.UsageError("--benchmarks is missing (--list names all)")
    if bool(FLAGS.checkpoint) == bool(FLAGS.predictions):
        raise app.UsageError("give --checkpoint to answer with a model, or --predictions to score a file of answers")
    if FLAGS.checkpoint and not FLAGS.output:
        raise app.UsageError("--checkpoint needs --output, the directory for answers and scores")


def _score_file(benchmark: "Benchmark") -> "Result":
    """Scores --predictions and prints the score."""
    import dataclasses

    from vocojax.evaluation.predictions import read_predictions

    predictions = read_predictions(FLAGS.predictions, benchmark, FLAGS.allow_missing)
    result = benchmark.score(predictions.texts, FLAGS.convention)
    result = dataclasses.replace(result, notes=(*result.notes, *predictions.notes))
    directory = Path(FLAGS.output or "") / benchmark.name
    result = _judged(benchmark, result, benchmark.items, predictions.texts, directory)
    print(result)
    return result


def _ask(benchmarks: "Sequence[Benchmark]") -> "list[Result]":
    """Answers and scores benchmarks with --checkpoint; returns the scores on process 0."""
    from vocojax.evaluation.benchmarks.base import Benchmark
    from vocojax.evaluation.running import PATIENCE, Asking, answer_benchmark
    from vocojax.inference.assistant import Assistant
    from vocojax.inference.caches.store import Store
    from vocojax.parallel import cluster, processes
    from vocojax.parallel.mesh import parse_mesh

    keep_programs()
    cluster.initialize(cluster.find_cluster(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id))
    assistant = Assistant.from_pretrained(FLAGS.checkpoint, visibility=FLAGS.visibility, mesh=parse_mesh(FLAGS.mesh),
                                          dtype=FLAGS.dtype)
    asking = Asking(Path(FLAGS.checkpoint).name, FLAGS.batch_size, FLAGS.vocos, FLAGS.limit,
                    Store(FLAGS.store) if FLAGS.store else None)
    results: list[Result] = []
    for benchmark in benchmarks:
        directory = Path(FLAGS.output) / benchmark.name
        texts = answer_benchmark(assistant, benchmark, directory, asking)

        def score(benchmark: Benchmark = benchmark, texts: list[str] = texts, directory: Path = directory) -> None:
            if result := _score(benchmark, texts, directory, FLAGS.convention):
                print(result)
                results.append(result)

        processes.wait_for_first(f"scores of {benchmark.name}", score, PATIENCE)
    return results


def _score(benchmark: "Benchmark", texts: Sequence[str], directory: Path, convention: str) -> "Result | None":
    """Writes the submission and the score of a model's answers; returns the score, None where labels are hidden."""
    from vocojax.evaluation.running import asked_items, write_submission
    from vocojax.files import write_atomically

    items = asked_items(benchmark, FLAGS.limit)
    if FLAGS.limit is None:
        for path in write_submission(benchmark, items, texts, directory):
            print(f"{benchmark.name}: wrote {path}")
    if all(item.gold is None for item in items):
        print(f"{benchmark.name}: labels are not public; send the file to the benchmark's server")
        return None
    result = benchmark.score(texts, convention, items)
    result = _judged(benchmark, result, items, texts, directory)
    write_atomically(directory / "result.json", json.dumps(result.as_json(), indent=2, ensure_ascii=False) + "\n")
    return result


def _judged(
    benchmark: "Benchmark", result: "Result", items: "Sequence[Item]", texts: Sequence[str | None], directory: Path
) -> "Result":
    """Returns a score with --judge's figures in front, for benchmarks that a judge scores; replies are stored."""
    from vocojax.errors import InputError
    from vocojax.evaluation.benchmarks.video_qa import OpenVideoQa
    from vocojax.evaluation.judge.endpoint import EndpointJudge
    from vocojax.evaluation.judge.local import LocalJudge
    from vocojax.evaluation.judge.replies import judge_pairs, pairs_of, stored_score, with_judge
    from vocojax.inference.assistant import Assistant

    if not FLAGS.judge or not isinstance(benchmark, OpenVideoQa):
        return result
    if not FLAGS.judge_replies and not FLAGS.output:
        raise app.UsageError("--judge needs --judge_replies or --output, where its replies are stored")
    path = Path(FLAGS.judge_replies) if FLAGS.judge_replies else directory / "judge.jsonl"
    pairs = pairs_of(items, texts)
    if FLAGS.judge == "stored":
        if not path.exists():
            raise InputError(f"{path}: is missing, so there are no stored replies")
        return with_judge(result, stored_score(path, pairs, FLAGS.judge_model), FLAGS.judge_model)
    if FLAGS.judge.startswith(("http://", "https://")):
        endpoint = EndpointJudge(FLAGS.judge, FLAGS.judge_model)
        judged = judge_pairs(endpoint, pairs, path, FLAGS.judge_threads)
        return with_judge(result, judged, FLAGS.judge_model, endpoint.usage)
    judge = LocalJudge(Assistant.from_pretrained(FLAGS.judge), FLAGS.judge_model)
    return with_judge(result, judge_pairs(judge, pairs, path), FLAGS.judge_model)
