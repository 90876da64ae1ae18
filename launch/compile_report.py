"""Compiles a stage's real step for a machine that is not there and says what it costs on it, before it is booked.

    . launch/xla_flags.sh v5p
    python launch/compile_report.py --config=configs/voco.py --topology=v5p:4x4x4 --config.batch_size=128 \
        --json report.json
    python launch/compile_report.py --config=configs/voco.py --topology=v5e:16x16 --config.batch_size=256 --fast \
        --compare-remat --json policies.json
    python launch/compile_report.py --config=configs/voco.py --topology=v5e:4x4 --search --policies=full,minimal \
        --rows=1,2 --meshes=1x16x1 --json search.json
    python launch/compile_report.py --config=configs/voco.py --topology=h100:8 --config.batch_size=128 \
        --config.accumulate=8

Needs the extra `tpu` (libtpu) or `cuda` (the CUDA plugin), no device. Paths of data and weights are not read. A search
or comparison that was ended goes on when it is given the same --json file again.
"""

import json
import os
import signal
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from vocojax.cli.terminal import require_writable, show_own_messages
from vocojax.config import ConfigError
from vocojax.costs.steps.compiling import CompilerError, Unfinished
from vocojax.costs.steps.report import compile_report
from vocojax.costs.steps.search import compare_remat, refuse_a_search, search
from vocojax.costs.steps.tables import comparison, table
from vocojax.costs.topologies import Topology
from vocojax.files import write_atomically
from vocojax.training.config import stage_config

CONFIG = config_flags.DEFINE_config_file("config", None, "The stage's ml_collections file.")
TOPOLOGY = flags.DEFINE_string("topology", None, "v5p:4x4x4, v5e:16x16*2 (two slices), h100:8 ...", required=True)
FAST = flags.DEFINE_bool("fast", False, "Stop at the scheduled program: seconds instead of minutes, times by roofline.")
REMAT = flags.DEFINE_bool("compare-remat", False, "Report on every rematerialisation policy.")
SEARCH = flags.DEFINE_bool("search", False, "Try rows per device x policy x mesh (fast) and rank them.")
POLICIES = flags.DEFINE_list("policies", [], "Policies to compare or search; all by default.")
ROWS = flags.DEFINE_list("rows", [], "Rows per device and part of a batch to search.")
MESHES = flags.DEFINE_list("meshes", [], "Meshes to search, data x fsdp x tensor: 1x256x1,2x128x1.")
JSON = flags.DEFINE_string("json", None, "Where to write all figures.")
require_writable("json")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    _refuse_what_does_nothing()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    show_own_messages()
    jax.config.update("jax_platforms", "cpu")  # accelerators that are there are not used
    values = CONFIG.value
    for key in ("tokenizer", "path", "image_root"):  # required of a run, of no use here
        values.data[key] = values.data[key] or "-"
    try:
        config, topology = stage_config(values, os.path.basename(sys.argv[0])), Topology(TOPOLOGY.value)
        if SEARCH.value or REMAT.value:
            found = (
                search(config, topology, POLICIES.value, ROWS.value, MESHES.value, path=JSON.value)
                if SEARCH.value else compare_remat(config, topology, POLICIES.value, fast=FAST.value, path=JSON.value)
            )
            print(comparison(found.reports, found.skipped))
            return
        if JSON.value:
            refuse_a_search(JSON.value)
        figures = compile_report(config, topology, fast=FAST.value)
    except (ConfigError, CompilerError, Unfinished) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("ended; the same command goes on" if JSON.value and (SEARCH.value or REMAT.value) else "ended")
    print(table(figures))
    if JSON.value:
        write_atomically(JSON.value, json.dumps(figures, indent=2))


def _refuse_what_does_nothing() -> None:
    if SEARCH.value and REMAT.value:
        raise app.UsageError("--search tries every policy, as --compare-remat does: give one of them")
    for flag, goes_with in ((ROWS, [SEARCH]), (MESHES, [SEARCH]), (POLICIES, [SEARCH, REMAT])):
        if flag.value and not any(mode.value for mode in goes_with):
            raise app.UsageError(f"--{flag.name} goes with {' or '.join('--' + mode.name for mode in goes_with)}")


if __name__ == "__main__":
    app.run(main)
