"""Compares answers from VoCo caches with those of a single pass, on easy-VQA's test images.

    vocojax agreement --checkpoint=runs/quickstart/seed_0/voco_1 --pairs=10000

Takes minutes on a CPU. `bash launch/quickstart.sh` trains that run. The command fails if a single answer differs.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence

from absl import flags

from vocojax.cli.flag_checks import refuse_arguments, refuse_empty, require_writable

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("checkpoint", None, "A run of training.", required=True)
    flags.DEFINE_integer("pairs", 10_000, "Number of random (image, question) pairs.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the pairs.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_string("json", None, "File to write the figures to.")
    refuse_empty("checkpoint")
    require_writable("json")


def main(arguments: Sequence[str]) -> None:
    """Compares."""
    refuse_arguments(arguments)
    from vocojax.data.sources.easy_vqa import EasyVqaSource
    from vocojax.evaluation.agreement import agreement
    from vocojax.inference.assistant import Assistant

    assistant = Assistant.from_run(FLAGS.checkpoint, visibility="voco")
    source = EasyVqaSource("test")
    images = assistant.load_images(source.images)
    questions = sorted({question.text for asked in source.questions for question in asked})
    found = agreement(assistant, images, questions, FLAGS.pairs, FLAGS.seed)
    if FLAGS.json:
        with open(FLAGS.json, "w", encoding="utf-8") as file:
            json.dump({name: dataclasses.asdict(way) for name, way in found.items()}, file, indent=2)
    for name, way in found.items():
        print(f"{name:8} {way.identical} of {way.pairs} answers identical, max |Δ logit| {way.max_abs_logit_diff:.2g}")
    different = sum(way.pairs - way.identical for way in found.values())
    if different:
        sys.exit(f"error: {different} answers differ")
