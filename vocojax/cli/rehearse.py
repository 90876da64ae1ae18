"""Shows on one page what a run will take before it is booked: time, memory, input, cost.

    . launch/xla_flags.sh v5p
    vocojax rehearse --config=voco --topology=v5p:4x4x4 --config.batch_size=128 --price=4.2 --gb_per_second=1 \\
        --config.data.path=mix.json --config.data.image_root=images --config.data.tokenizer=vicuna-7b-v1.5

The step is compiled for the topology as `vocojax report` does it: this needs the extra `tpu` (libtpu) or `cuda` and no
device. Data that the config names are packed, and batches are made of them for some seconds on this machine; without
--config.data.tokenizer typical rows stand for them. --workdir measures how fast checkpoints are written there, with a
file that is removed again. No weights are read.
"""

import json
from collections.abc import Sequence

from absl import app, flags

from vocojax.cli import config_flag
from vocojax.cli.flag_checks import refuse_arguments, require_writable

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    config_flag.define_config("The stage.")
    flags.DEFINE_string("topology", None, "v5p:4x4x4, v5e:16x16*2 (two slices), h100:8 ...", required=True)
    flags.DEFINE_bool("fast", False, "Stop at the scheduled program: seconds, not minutes; times from a roofline.")
    flags.DEFINE_float("price", 0.0, "Dollars per chip and hour.", lower_bound=0.0)
    flags.DEFINE_float("gb_per_second", 0.0, "GB (1e9 bytes) per second at which all hosts together write a "
                       "checkpoint.", lower_bound=0.0)
    flags.DEFINE_string("workdir", None, "Directory or bucket whose rate of writing is measured.")
    flags.DEFINE_integer("records", 2000, "Records that are laid out, evenly spread.", lower_bound=1)
    flags.DEFINE_float("seconds", 10.0, "Seconds in which batches are made.", lower_bound=0.1)
    flags.DEFINE_string("json", None, "File to write all figures to.")
    require_writable("json")


def main(arguments: Sequence[str]) -> None:
    """Rehearses."""
    refuse_arguments(arguments)
    if FLAGS.gb_per_second and FLAGS.workdir:
        raise app.UsageError("--gb_per_second states what --workdir measures: give one of them")
    values = config_flag.config_values()
    import jax

    from vocojax.costs.rehearsal import measured_gb_per_second, page, rehearse
    from vocojax.costs.topologies import Topology
    from vocojax.files import write_atomically
    from vocojax.training.config import stage_config

    jax.config.update("jax_platforms", "cpu")  # accelerators that are there are not used
    has_data = bool(values["data"].get("tokenizer"))
    if not has_data:
        for key in ("tokenizer", "path", "image_root"):
            values["data"][key] = values["data"].get(key) or "-"
    config, topology = stage_config(values, FLAGS.config), Topology(FLAGS.topology)
    rate = measured_gb_per_second(FLAGS.workdir) if FLAGS.workdir else FLAGS.gb_per_second
    figures = rehearse(config, topology, has_data=has_data, price=FLAGS.price, gb_per_second=rate, fast=FLAGS.fast,
                       records=FLAGS.records, seconds=FLAGS.seconds)
    print(page(figures))
    if FLAGS.json:
        write_atomically(FLAGS.json, json.dumps(figures, indent=2))
