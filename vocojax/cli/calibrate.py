"""Calibrates vocos="auto": how unsure an answer from few VoCo tokens may be.

    vocojax calibrate --checkpoint=runs/voco_8 --benchmark=gqa --data_root=data --agreement=0.99

The model answers questions from 1, 2, 4, ... and all VoCo tokens. Those of one half of the images give the threshold
(split conformal prediction), which is written beside the checkpoint; those of the other half measure what it does. Then
`vocojax.load(CHECKPOINT).read(cache, question, vocos="auto")` reads no more tokens than a question needs. New questions
agree with the answers from all tokens at least as often as asked for, if they are like these.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from vocojax.cli.flag_checks import refuse_arguments, refuse_empty, require_writable

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("checkpoint", None, "A directory of weights, in which the calibration is written.",
                        required=True)
    flags.DEFINE_string("benchmark", "easy_vqa", "Whose questions are asked (vocojax evaluate --list); no labels are "
                        "read.")
    flags.DEFINE_string("data_root", "data", "Directory of the official files, a folder per benchmark.")
    flags.DEFINE_integer("questions", 2000, "About how many questions, evenly spread over the benchmark.",
                         lower_bound=2)
    flags.DEFINE_float("agreement", 0.99, "Share of answers that must be those from all tokens, between 0 and 1.")
    flags.DEFINE_integer("batch_size", 32, "Questions that are answered at once.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Dtype of the model; default: as stored.")
    flags.DEFINE_string("json", None, "File to write the calibration, the measurement and the curve to.")
    refuse_empty("checkpoint", "benchmark", "data_root")
    require_writable("json")


def main(arguments: Sequence[str]) -> None:
    """Calibrates."""
    refuse_arguments(arguments)
    import dataclasses

    from vocojax.evaluation.benchmarks.registry import open_benchmark
    from vocojax.evaluation.training_scores import subset
    from vocojax.inference.assistant import Assistant
    from vocojax.inference.calibration import calibration_of, curve, reached, trace_questions
    from vocojax.inference.refining import write_calibration

    benchmark = open_benchmark(FLAGS.benchmark, FLAGS.data_root)
    items = subset(benchmark.items, FLAGS.questions)
    assistant = Assistant.from_pretrained(FLAGS.checkpoint, dtype=FLAGS.dtype)
    traces = trace_questions(assistant, benchmark.requests(items), FLAGS.batch_size)
    half = {visuals: number % 2 for number, visuals in enumerate(dict.fromkeys(item.visuals for item in items))}
    parts = [[trace for trace, item in zip(traces, items, strict=True) if half[item.visuals] == part]
             for part in (0, 1)]
    calibration = calibration_of(assistant, parts[0], FLAGS.agreement)
    write_calibration(FLAGS.checkpoint, calibration)
    levels, test = calibration.levels, parts[1] or parts[0]
    measured = reached(test, levels, calibration.threshold)
    print(f"threshold {calibration.threshold:.4g} nats, from {calibration.questions:,} questions for an agreement of "
          f"{FLAGS.agreement:.1%}\non {len(test):,} other questions: agreement {measured.agreement:.2%}, "
          f"{measured.mean_tokens:.2f} of {levels[-1]} tokens read in the mean\n\nthreshold  agreement  tokens")
    points = curve(test, levels)
    for threshold, point in points:
        print(f"{threshold:9.4g}  {point.agreement:9.2%}  {point.mean_tokens:6.2f}")
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps({
            **dataclasses.asdict(calibration), "measured": measured._asdict(), "test_questions": len(test),
            "curve": [{"threshold": threshold, **point._asdict()} for threshold, point in points]}, indent=2) + "\n")
