"""Compares answers from VoCo caches with those of a single pass, on easy-VQA's test images; minutes on a CPU.

    python launch/agreement.py --checkpoint=runs/quickstart/seed_0/voco_1 --pairs=10000

after `bash launch/quickstart.sh`, which trains that run. Ends with an error if a single answer differs.
"""

import dataclasses
import json
import sys

import numpy as np
from absl import app, flags

from vocojax.cli.terminal import refuse_empty, require_writable, show_own_messages
from vocojax.data.sources.easy_vqa import EasyVqaSource
from vocojax.evaluation.agreement import agreement
from vocojax.inference.assistant import Assistant
from vocojax.training.checkpoints import CheckpointError

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run of training.", required=True)
PAIRS = flags.DEFINE_integer("pairs", 10_000, "Random (image, question) pairs.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the pairs.")
JSON = flags.DEFINE_string("json", None, "Where to write the figures.")
refuse_empty("checkpoint")
require_writable("json")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    show_own_messages()
    try:
        assistant = Assistant.from_run(CHECKPOINT.value, visibility="voco")
        source = EasyVqaSource("test")
        images = assistant.load_images(source.images)
    except (CheckpointError, OSError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    questions = sorted({question.text for asked in source.questions for question in asked})
    found = agreement(assistant, images, questions, PAIRS.value, SEED.value)
    if JSON.value:
        with open(JSON.value, "w", encoding="utf-8") as file:
            json.dump({name: dataclasses.asdict(way) for name, way in found.items()}, file, indent=2)
    for name, way in found.items():
        print(f"{name:8} {way.identical} of {way.pairs} answers identical, max |Δ logit| {way.max_abs_logit_diff:.2g}")
    different = int(np.sum([way.pairs - way.identical for way in found.values()]))
    if different:
        sys.exit(f"error: {different} answers differ")


if __name__ == "__main__":
    app.run(main)
