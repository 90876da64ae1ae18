"""Reports what a stage's real step costs on a machine that is not there.

    . launch/xla_flags.sh v5p
    vocojax report --config=configs/voco.py --topology=v5p:4x4x4 --config.batch_size=128 --json=report.json
    vocojax report --config=configs/voco.py --topology=v5e:16x16 --config.batch_size=256 --fast \\
        --compare-remat --json=policies.json
    vocojax report --config=configs/voco.py --topology=v5e:4x4 --search --policies=full,minimal --rows=1,2 \\
        --meshes=1x16x1 --json=search.json
    vocojax report --config=configs/video_7b.py --topology=v5p:2x2x1 --frames=8,64,512,2048 --fast
    vocojax report --config=configs/voco.py --topology=h100:8 --config.batch_size=128 --config.accumulate=8

The step is compiled for the topology. This needs the extra `tpu` (libtpu) or `cuda` (the CUDA plugin) and no device.
Paths of data and weights are not read. A search or comparison that was ended resumes with the same --json file.
"""

import json
import signal
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from vocojax.cli import config_flag
from vocojax.cli.flag_checks import refuse_arguments, require_writable

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    config_flag.define_config("The stage.")
    flags.DEFINE_string("topology", None, "v5p:4x4x4, v5e:16x16*2 (two slices), h100:8 ...", required=True)
    flags.DEFINE_bool("fast", False, "Stop at the scheduled program: seconds, not minutes; times from a roofline.")
    flags.DEFINE_bool("compare-remat", False, "Report on every rematerialisation policy.")
    flags.DEFINE_bool("search", False, "Try rows per device x policy x mesh (fast) and rank them.")
    flags.DEFINE_list("frames", [], "Report on both plans of a stage of videos, with each of these numbers of "
                      "frames per row.")
    flags.DEFINE_list("policies", [], "Policies to compare or search; default: all.")
    flags.DEFINE_list("rows", [], "Rows per device, and part of a batch, to search.")
    flags.DEFINE_list("meshes", [], "Meshes to search, data x fsdp x tensor: 1x256x1,2x128x1.")
    flags.DEFINE_float("price", 0.0, "Dollars per chip and hour: adds $ per hour and for the run. For one setting.",
                       lower_bound=0.0)
    flags.DEFINE_string("json", None, "File to write all figures to.")
    require_writable("json")


def main(arguments: Sequence[str]) -> None:
    """Reports."""
    refuse_arguments(arguments)
    _refuse_what_does_nothing()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _report()
    except KeyboardInterrupt:
        several = FLAGS.search or FLAGS["compare-remat"].value
        sys.exit("ended; run the same command to resume" if FLAGS.json and several else "ended")


def _report() -> None:
    values = config_flag.config_values()
    import jax

    from vocojax.costs.prices import run_costs
    from vocojax.costs.steps.report import compile_report
    from vocojax.costs.steps.search import compare_remat, refuse_a_search, search
    from vocojax.costs.steps.tables import comparison, table
    from vocojax.costs.steps.videos import frames_report, frames_table
    from vocojax.costs.topologies import Topology
    from vocojax.files import write_atomically
    from vocojax.training.config import stage_config

    jax.config.update("jax_platforms", "cpu")  # accelerators that are there are not used
    for key in ("tokenizer", "path", "image_root"):  # required of a run, of no use here
        values["data"][key] = values["data"][key] or "-"
    config, topology = stage_config(values, FLAGS.config), Topology(FLAGS.topology)
    if FLAGS.search or FLAGS["compare-remat"].value:
        found = (
            search(config, topology, FLAGS.policies, FLAGS.rows, FLAGS.meshes, path=FLAGS.json)
            if FLAGS.search else compare_remat(config, topology, FLAGS.policies, fast=FLAGS.fast, path=FLAGS.json)
        )
        print(comparison(found.reports, found.skipped))
        return
    if FLAGS.json:
        refuse_a_search(FLAGS.json)
    if FLAGS.frames:
        figures: Any = frames_report(config, topology, [int(count) for count in FLAGS.frames], fast=FLAGS.fast)
        print(frames_table(config, figures))
    else:
        figures = compile_report(config, topology, fast=FLAGS.fast)
        figures["run"] = run_costs(figures, config.steps, FLAGS.price)
        print(table(figures))
    if FLAGS.json:
        write_atomically(FLAGS.json, json.dumps(figures, indent=2))


def _refuse_what_does_nothing() -> None:
    if FLAGS.search and FLAGS["compare-remat"].value:
        raise app.UsageError("--search tries every policy, as --compare-remat does: give one of them")
    if not all(count.isdecimal() and int(count) for count in FLAGS.frames):
        raise app.UsageError(f"--frames must be whole numbers of frames such as 8,64,512, got {','.join(FLAGS.frames)}")
    if FLAGS.frames and (FLAGS.search or FLAGS["compare-remat"].value):
        raise app.UsageError("--frames reports on both plans: leave out --search and --compare-remat")
    if FLAGS.price and (FLAGS.frames or FLAGS.search or FLAGS["compare-remat"].value):
        raise app.UsageError("--price goes with a report on one setting: of several, the fastest is the cheapest")
    for name, goes_with in (("rows", ["search"]), ("meshes", ["search"]), ("policies", ["search", "compare-remat"])):
        if FLAGS[name].value and not any(FLAGS[mode].value for mode in goes_with):
            modes = " or ".join(f"--{mode}" for mode in goes_with)
            raise app.UsageError(f"--{name} goes with {modes}: add it, or leave --{name} out")
