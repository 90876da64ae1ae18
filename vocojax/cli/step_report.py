"""Reports what training, prefill, compression and decoding cost on this CPU, beside PyTorch.

    vocojax step_report --json=report.json

The peer is transformers' LlamaForCausalLM with a 4-D mask, at equal shapes in fp32: a model of 58 million parameters, 2
rows of 709 tokens, 1 and 8 images that are compressed, 1 and 32 answers of 64 tokens (by `generate`). Both take turns
in processes of their own. CPU seconds are compared, because other programs change the elapsed seconds. Takes minutes,
and needs the extra `test`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from vocojax.cli.flag_checks import refuse_arguments, require_writable

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("json", None, "File to write the figures to.")
    flags.DEFINE_integer("repeats", 7, "Rounds, of which the medians are reported.", lower_bound=1)
    require_writable("json")


def main(arguments: Sequence[str]) -> None:
    """Reports."""
    refuse_arguments(arguments)
    from vocojax.costs import step_times

    report = step_times.step_report(FLAGS.repeats)
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(step_times.format_report(report))
