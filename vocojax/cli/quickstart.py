"""Trains every row of the retention table on easy-VQA and reports it.

    bash launch/quickstart.sh [--seeds=0,1,2] [--full]

installs what it needs and runs it. What is finished in the work directory is not repeated.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from vocojax.cli.flag_checks import refuse_arguments
from vocojax.errors import MissingPackage

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list("seeds", ["0"], "Seeds; everything is trained once for each.")
    flags.DEFINE_bool("full", False, "Add VoCo-2, VoCo-8 and all baselines.")
    flags.DEFINE_string("workdir", "runs/quickstart", "Directory of runs and results.")
    flags.DEFINE_bool("json", False, "Print retention.json as well.")


def main(arguments: Sequence[str]) -> None:
    """Trains and reports."""
    refuse_arguments(arguments)
    if not all(seed.isdecimal() for seed in FLAGS.seeds):
        raise app.UsageError(f"--seeds must be whole numbers such as 0,1,2, got {','.join(FLAGS.seeds)}")
    try:
        from configs.quickstart import get_config
    except ImportError as error:
        raise MissingPackage("configs/quickstart.py is not in the wheel: run bash launch/quickstart.sh in a checkout "
                             "of the repository") from error
    from vocojax.experiments.quickstart import Quickstart
    from vocojax.parallel.preemption import Preempted

    workdir = Path(FLAGS.workdir)
    try:
        result = Quickstart(get_config, workdir, [int(seed) for seed in FLAGS.seeds], FLAGS.full).run()
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        return
    if FLAGS.json:
        print(json.dumps(result, indent=2))
    print(workdir / "retention.json")
    print(workdir / "report.html")
