"""Reports what a VoCo cache saves (paper Table 7): bytes, FLOPs and times.

    vocojax efficiency --config=configs/voco.py --vocos=1,8,128 --text=32,64,128 --json=efficiency.json

FLOPs are counted in the programs compiled for the CPU, whatever device is there; this makes no parameter of the
config's model. Times are those of the device that is here: of the same model on an accelerator, and of one of width 512
with 8 layers on a CPU; the last line says which.
"""

import json
from collections.abc import Sequence

from absl import app, flags

from vocojax.cli import config_flag
from vocojax.cli.flag_checks import refuse_arguments, require_writable

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    config_flag.define_config("The stage; only its `model` is read.")
    flags.DEFINE_list("vocos", ["1", "8", "128"], "Numbers of VoCo tokens.")
    flags.DEFINE_list("text", ["32", "64", "128"], "Numbers of text tokens.")
    flags.DEFINE_string("json", None, "File to write all figures to.")
    require_writable("json")


def main(arguments: Sequence[str]) -> None:
    """Reports."""
    refuse_arguments(arguments)
    for name in ("vocos", "text"):
        values: list[str] = FLAGS[name].value or []
        if not values or not all(value.isdecimal() and int(value) > 0 for value in values):
            raise app.UsageError(f"--{name} must be whole numbers >= 1 such as 1,8,128, got {','.join(values)}")
    model_values = config_flag.config_values().get("model", {})
    from vocojax.config import ModelConfig, build
    from vocojax.costs.answers import efficiency, format_rows

    config = build(ModelConfig, model_values, "model")
    report = efficiency(config, [int(n) for n in FLAGS.vocos], [int(n) for n in FLAGS.text])
    if FLAGS.json:
        with open(FLAGS.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
    summary, measured = report["summary"], report["measured"]
    model = measured["model"]
    print(format_rows(report["rows"]))
    print(f"\n{summary['vocos']} VoCo tokens, {summary['text']} text tokens: cache -{summary['cache_saved']:.2%} of "
          f"the full one, FLOPs -{summary['flops_saved']:.2%} of no cache and {summary['flops_over_text_only']:.4f} x "
          f"text only, time to the first token {summary['measured_first_token_ratio']:.2%} of no cache")
    print(f"FLOPs: {report['flops_counted_in']}")
    print(f"times: {measured['device']}, model: " + (model if isinstance(model, str) else (
        f"reduced to width {model['decoder']['width']}, {model['decoder']['depth']} layers, random parameters")))
