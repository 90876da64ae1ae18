"""Answers benchmarks with a model and scores the answers; or scores a file of answers.

    vocojax evaluate --benchmarks=pope,gqa --data_root=data --checkpoint=runs/voco --output=results
    vocojax evaluate --benchmarks=pope --data_root=data --predictions=answers.jsonl

Run the same command after an interruption: questions that are answered are not asked again. Scores are those of each
benchmark's official script; --convention=lmms-eval scores as lmms-eval does where it differs. On several hosts the same
command runs on each, with an --output that all of them share. --list names the benchmarks.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

from vocojax.cli.flag_checks import refuse_arguments, refuse_empty, require_writable

if TYPE_CHECKING:
    from vocojax.evaluation.benchmarks.base import Benchmark, Item, Result

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list("benchmarks", [], "Benchmarks or groups of them (table1, rec, reg, video), separated by commas.")
    flags.DEFINE_bool("list", False, "Name the benchmarks and exit.")
    flags.DEFINE_string("data_root", "data", "Directory of the official files, a folder per benchmark.")
    flags.DEFINE_string("checkpoint", None, "Weights in any layout, or a run of training.")
    flags.DEFINE_string("output", None, "Directory for answers and scores, a folder per benchmark.")
    flags.DEFINE_string("predictions", None, "File of answers to score, in place of a model.")
    flags.DEFINE_bool("allow_missing", False, "Accept questions without an answer, as the official tool treats them.")
    flags.DEFINE_string("convention", "official", "Definition of the scores: official, llava or lmms-eval.")
    flags.DEFINE_integer("limit", None, "Ask the first so many questions of each benchmark only.", lower_bound=1)
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
    refuse_empty("data_root", "checkpoint", "output", "predictions", "store", "judge")
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
    names = registry.expand(FLAGS.benchmarks)
    if FLAGS.predictions and len(names) > 1:
        raise app.UsageError(f"--predictions holds the answers to one benchmark, got {', '.join(names)}")
    benchmarks = [registry.open_benchmark(name, FLAGS.data_root) for name in names]
    results = [_score_file(benchmarks[0])] if FLAGS.predictions else _ask(benchmarks)
    if FLAGS.json and results:
        scores = json.dumps([result.as_json() for result in results], indent=2, ensure_ascii=False)
        Path(FLAGS.json).write_text(scores + "\n", encoding="utf-8")


def _check() -> None:
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
    result = _judged(benchmark, result, benchmark.items, predictions.texts)
    print(result)
    return result


def _ask(benchmarks: "Sequence[Benchmark]") -> "list[Result]":
    """Answers and scores benchmarks with --checkpoint; returns the scores on process 0."""
    from vocojax.evaluation.running import PATIENCE, Asking, answer_benchmark
    from vocojax.inference.assistant import Assistant
    from vocojax.inference.caches.store import Store
    from vocojax.parallel import cluster, processes
    from vocojax.parallel.mesh import parse_mesh

    cluster.initialize(cluster.find_cluster(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id))
    assistant = Assistant.from_pretrained(FLAGS.checkpoint, visibility=FLAGS.visibility, mesh=parse_mesh(FLAGS.mesh),
                                          dtype=FLAGS.dtype)
    asking = Asking(Path(FLAGS.checkpoint).name, FLAGS.batch_size, FLAGS.vocos, FLAGS.limit,
                    Store(FLAGS.store) if FLAGS.store else None)
    results: list[Result] = []
    for benchmark in benchmarks:
        directory = Path(FLAGS.output) / benchmark.name
        texts = answer_benchmark(assistant, benchmark, directory, asking)
        processes.wait_for_first(f"scores of {benchmark.name}",
                                 functools.partial(_score, benchmark, texts, directory, results), PATIENCE)
    return results


def _score(benchmark: "Benchmark", texts: Sequence[str], directory: Path, results: "list[Result]") -> None:
    """Writes the submission and the score of a model's answers and adds the score to `results`."""
    from vocojax.evaluation.running import asked_items, write_submission
    from vocojax.files import write_atomically

    items = asked_items(benchmark, FLAGS.limit)
    if FLAGS.limit is None:
        for path in write_submission(benchmark, items, texts, directory):
            print(f"{benchmark.name}: wrote {path}")
    if all(item.gold is None for item in items):
        print(f"{benchmark.name}: labels are not public; send the file to the benchmark's server")
        return
    result = benchmark.score(texts, FLAGS.convention, items)
    result = _judged(benchmark, result, items, texts)
    write_atomically(directory / "result.json", json.dumps(result.as_json(), indent=2, ensure_ascii=False) + "\n")
    print(result)
    results.append(result)


def _judged(
    benchmark: "Benchmark", result: "Result", items: "Sequence[Item]", texts: Sequence[str | None]
) -> "Result":
    """Returns a score with --judge's figures in front, for benchmarks that a judge scores."""
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
    path = Path(FLAGS.judge_replies) if FLAGS.judge_replies else Path(FLAGS.output) / benchmark.name / "judge.jsonl"
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
