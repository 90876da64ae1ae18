"""What a VoCo cache saves (paper Table 7): cache bytes and FLOPs at a config's shape, times on the device that is here.

    python launch/efficiency.py --config=configs/voco.py --vocos=1,8,128 --text=32,64,128 --json=efficiency.json

FLOPs are counted in the programs compiled for the CPU, whatever device is there; no parameter of the config's model is
made to count them. Times are of the same model on an accelerator, and of one of width 512 with 8 layers on a CPU; the
last line says which.
"""

import json
import sys

from absl import app, flags
from ml_collections import config_flags

from vocojax.cli.terminal import require_writable, show_own_messages
from vocojax.config import ConfigError, ModelConfig, build
from vocojax.costs.answers import efficiency, format_rows

CONFIG = config_flags.DEFINE_config_file("config", None, "A stage's config, of which only `model` is read.")
VOCOS = flags.DEFINE_list("vocos", ["1", "8", "128"], "Numbers of VoCo tokens.")
TEXT = flags.DEFINE_list("text", ["32", "64", "128"], "Numbers of text tokens.")
JSON = flags.DEFINE_string("json", None, "Where to write all figures.")
flags.mark_flag_as_required("config")
require_writable("json")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    for name, values in (("vocos", VOCOS.value), ("text", TEXT.value)):
        if not values or not all(value.isdecimal() and int(value) > 0 for value in values):
            raise app.UsageError(f"--{name} must be whole numbers >= 1 such as 1,8,128, got {','.join(values)}")
    show_own_messages()
    try:
        config = build(ModelConfig, json.loads(CONFIG.value.model.to_json()), "model")
    except ConfigError as error:
        sys.exit(f"error: {error}")
    report = efficiency(config, [int(n) for n in VOCOS.value], [int(n) for n in TEXT.value])
    if JSON.value:
        with open(JSON.value, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
    summary, measured = report["summary"], report["measured"]
    model = measured["model"]
    print(format_rows(report["rows"]))
    print(f"\n{summary['vocos']} VoCo tokens, {summary['text']} text tokens: cache -{summary['cache_saved']:.2%} of "
          f"the full one, FLOPs -{summary['flops_saved']:.2%} of no cache and {summary['flops_over_text_only']:.4f} x "
          f"text alone, time to the first token {summary['measured_first_token_ratio']:.2%} of no cache")
    print(f"FLOPs: {report['flops_counted_in']}")
    print(f"times: {measured['device']}, model: " + (model if isinstance(model, str) else (
        f"reduced to width {model['decoder']['width']}, {model['decoder']['depth']} layers, random parameters")))


if __name__ == "__main__":
    app.run(main)
