"""Trains one stage, or resumes its run.

    vocojax train --config=configs/voco.py --workdir=runs/voco [--config.KEY=VALUE ...] [--dry_run]

--dry_run opens the data, makes one batch, prints what a start would do (devices, parameters, memory, samples per step,
epochs, where everything comes from) and stops; nothing is compiled, nothing is written to the work directory.

On several hosts the same command runs on each. TPU pods, SLURM and MPI tell JAX which process is which. Elsewhere give
--coordinator_address=HOST:PORT --num_processes=N --process_id=I, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID. SIGTERM saves what is new and exits with 0, or with --stopped_status; run the same command to resume.
(Only in the first seconds, while Python imports JAX, SIGTERM ends the process like any other.)
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence

from absl import flags

from vocojax.cli import config_flag
from vocojax.cli.flag_checks import refuse_arguments

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    config_flag.define_config("The stage.")
    flags.DEFINE_string("workdir", None, "Directory of checkpoints and logs; a run in it is resumed.")
    flags.DEFINE_bool("extend", False, "Train a finished run for more steps: those of the config. The learning rate "
                      "is then that of a run with the new number of steps.")
    flags.DEFINE_bool("dry_run", False, "Open the data, make one batch, print what a start would do, and stop.")
    flags.DEFINE_list("profile", [], "FIRST,LAST: writes a trace of these steps to WORKDIR/profile.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where it is not detected.")
    flags.DEFINE_integer("num_processes", None, "Number of processes, where it is not detected.")
    flags.DEFINE_integer("process_id", None, "Number of this process, where it is not detected.")
    flags.DEFINE_float("start_seconds", 300.0, "Seconds to wait at the start for the other processes.")
    flags.DEFINE_integer("heartbeat_seconds", 100, "Seconds after which a silent process counts as dead.")
    flags.DEFINE_integer("stopped_status", 0, "Exit status of a run that SIGTERM stopped and that has saved; whatever "
                                              "starts it again can tell it from a finished one.")
    flags.register_validator("profile", lambda steps: len(steps) in (0, 2) and all(map(str.isdecimal, steps)),
                             "must be FIRST,LAST: the numbers of two steps")
    flags.mark_flag_as_required("workdir")


def main(arguments: Sequence[str]) -> None:
    """Trains."""
    refuse_arguments(arguments)
    from vocojax.parallel.preemption import Preempted, leave_on_sigterm

    leave_on_sigterm(FLAGS.stopped_status)
    config = config_flag.stage()
    from vocojax.evaluation.training_scores import open_scorer
    from vocojax.parallel import cluster
    from vocojax.training import stage

    if FLAGS.profile:
        first, last = map(int, FLAGS.profile)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, profile=(first, last)))
    try:
        found = cluster.find_cluster(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
        cluster.initialize(found, FLAGS.start_seconds, FLAGS.heartbeat_seconds)
        _warn_of_cpu()
        if not FLAGS.dry_run:
            stage.train(config, FLAGS.workdir, open_scorer=open_scorer, extend=FLAGS.extend)
            return
        banner = stage.dry_run(config, FLAGS.workdir, open_scorer, FLAGS.extend)
        if banner:
            print(banner)
    except Preempted as stopped:
        logging.getLogger("vocojax").warning("%s", stopped)
        sys.exit(FLAGS.stopped_status)


def _warn_of_cpu() -> None:
    """Warns where JAX fell back to the CPU and nobody asked for it."""
    import jax

    if jax.default_backend() == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        logging.getLogger("vocojax").warning(
            "JAX found no accelerator, so this runs on the CPU. If there is one, install its plug-in (pip install "
            "-e '.[tpu]' or -e '.[cuda]'); JAX_PLATFORMS=cpu says that the CPU is meant")
