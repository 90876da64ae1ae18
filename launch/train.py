"""Trains one stage: python launch/train.py --config=configs/voco.py --workdir=runs/voco [--config.KEY=VALUE ...]

On several hosts the same command runs on each. TPU pods, SLURM and MPI say themselves who is who; elsewhere say
--coordinator_address=HOST:PORT --num_processes=N --process_id=I (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
JAX_PROCESS_ID). SIGTERM saves what is new and exits with 0, or --stopped_status; the same command goes on. (Only in the
seconds before, when Python imports, it ends the process as any other.)
"""

import dataclasses
import logging
import sys

from absl import app, flags
from ml_collections import config_flags

from vocojax.cli.terminal import show_own_messages
from vocojax.config import ConfigError
from vocojax.data.loader import SkippedTooMany, StreamStateError
from vocojax.parallel import cluster, processes
from vocojax.parallel.preemption import Preempted, leave_on_sigterm
from vocojax.training.checkpoints import CheckpointError
from vocojax.training.config import stage_config
from vocojax.training.loop import NonFiniteLoss
from vocojax.training.stage import train

CONFIG = config_flags.DEFINE_config_file("config", None, "The stage's ml_collections file.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and logs go; a run in it is resumed.")
PROFILE = flags.DEFINE_list("profile", [], "FIRST,LAST: trace these steps to WORKDIR/profile.")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where it is not detected.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are, where not detected.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, where not detected.")
START_SECONDS = flags.DEFINE_float("start_seconds", cluster.START_SECONDS, "How long to wait for the others.")
HEARTBEAT_SECONDS = flags.DEFINE_integer("heartbeat_seconds", 100, "After how long a silent process counts as dead.")
STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status", 0, "Exit status of a run that was told to stop and has saved, for who starts it anew.")
flags.register_validator("profile", lambda steps: len(steps) in (0, 2) and all(map(str.isdecimal, steps)),
                         "must be FIRST,LAST: the numbers of two steps")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    leave_on_sigterm(STOPPED_STATUS.value)
    show_own_messages()
    try:
        source = config_flags.get_config_filename(flags.FLAGS["config"])
        config = stage_config(CONFIG.value, source)
        if PROFILE.value:
            traced = dataclasses.replace(config.run, profile=tuple(map(int, PROFILE.value)))
            config = dataclasses.replace(config, run=traced)
        found = cluster.find_cluster(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        cluster.initialize(found, START_SECONDS.value, HEARTBEAT_SECONDS.value)
        train(config, WORKDIR.value)
    except Preempted as stopped:
        logging.getLogger("vocojax").warning("%s", stopped)
        sys.exit(STOPPED_STATUS.value)
    except (ConfigError, CheckpointError, NonFiniteLoss, SkippedTooMany, StreamStateError, ImportError, OSError,
            cluster.ClusterError, processes.MissingProcesses) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
