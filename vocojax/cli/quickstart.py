"""Trains every row of the retention table on easy-VQA and reports it.

    bash launch/quickstart.sh [--seeds=0,1,2] [--full]
    bash launch/quickstart.sh --video [--seeds=0,1,2]              the table about time
    bash launch/quickstart.sh --mosaic [--seeds=0,1,2] [--full]    the paper's tables on a task that is not saturated

installs what it needs and runs it. What is finished in the work directory is not repeated.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

from vocojax.cli.flag_checks import refuse_arguments
from vocojax.errors import MissingPackage

if TYPE_CHECKING:
    from vocojax.experiments.mosaic import Mosaic
    from vocojax.experiments.quickstart import Quickstart
    from vocojax.experiments.video import VideoQuickstart

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list("seeds", ["0"], "Seeds; everything is trained once for each.")
    flags.DEFINE_bool("full", False, "Add VoCo-2, VoCo-8 and all baselines.")
    flags.DEFINE_bool("video", False, "Train the video stage on clips instead: is the order of frames learnt?")
    flags.DEFINE_bool("mosaic", False, "Train the paper's tables on mosaics instead; --full adds the recipes.")
    flags.DEFINE_string("workdir", None, "Directory of runs and results; runs/quickstart, runs/quickstart_video or "
                        "runs/mosaic.")
    flags.DEFINE_bool("json", False, "Print the results' JSON as well.")


def main(arguments: Sequence[str]) -> None:
    """Trains and reports."""
    refuse_arguments(arguments)
    if not all(seed.isdecimal() for seed in FLAGS.seeds):
        raise app.UsageError(f"--seeds must be whole numbers such as 0,1,2, got {','.join(FLAGS.seeds)}")
    if FLAGS.video and FLAGS.mosaic:
        raise app.UsageError("--video and --mosaic are two experiments: choose one")
    if FLAGS.video and FLAGS.full:
        raise app.UsageError("--full adds rows to the retention table, which --video does not make: leave one out")
    from vocojax.parallel.preemption import Preempted

    experiment = _experiment([int(seed) for seed in FLAGS.seeds])
    try:
        result = experiment.run()
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        return
    if FLAGS.json:
        print(json.dumps(result, indent=2))
    print(experiment.workdir / experiment.RESULT)
    print(experiment.workdir / "report.html")


def _experiment(seeds: Sequence[int]) -> "Quickstart | VideoQuickstart | Mosaic":
    """Returns the experiment that the flags choose.

    Raises:
      MissingPackage: its config file is not there.
    """
    try:
        from configs import mosaic, quickstart, quickstart_video
    except ImportError as error:
        raise MissingPackage("configs/quickstart.py is not in the wheel: run bash launch/quickstart.sh in a checkout "
                             "of the repository") from error
    if FLAGS.video:
        from vocojax.experiments.video import VideoQuickstart

        return VideoQuickstart(quickstart_video.get_config, Path(FLAGS.workdir or "runs/quickstart_video"), seeds)
    if FLAGS.mosaic:
        from vocojax.experiments.mosaic import RECIPES, Mosaic

        recipes = RECIPES if FLAGS.full else ()
        return Mosaic(mosaic.get_config, Path(FLAGS.workdir or "runs/mosaic"), seeds, recipes=recipes)
    from vocojax.experiments.quickstart import Quickstart

    return Quickstart(quickstart.get_config, Path(FLAGS.workdir or "runs/quickstart"), seeds, FLAGS.full)
