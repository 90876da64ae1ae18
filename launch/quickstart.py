"""Trains every row of the retention table on easy-VQA and reports it; `launch/quickstart.sh` installs and runs it."""

import json
import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.quickstart import get_config
from vocojax.cli.terminal import show_own_messages
from vocojax.config import ConfigError
from vocojax.data.loader import SkippedTooMany, StreamStateError
from vocojax.experiments.quickstart import Quickstart
from vocojax.parallel.preemption import Preempted
from vocojax.training.checkpoints import CheckpointError
from vocojax.training.loop import NonFiniteLoss

SEEDS = flags.DEFINE_list("seeds", ["0"], "One training of everything for each.")
FULL = flags.DEFINE_bool("full", False, "Add Avg. Pool, Q-Former, VoCo-2 and VoCo-8.")
WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "For runs and results; what is finished is not repeated.")
JSON = flags.DEFINE_bool("json", False, "Print retention.json as well.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not all(seed.isdecimal() for seed in SEEDS.value):
        raise app.UsageError(f"--seeds must be whole numbers such as 0,1,2, got {','.join(SEEDS.value)}")
    show_own_messages()
    workdir = Path(WORKDIR.value)
    try:
        result = Quickstart(get_config, workdir, [int(seed) for seed in SEEDS.value], FULL.value).run()
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        return
    except (ConfigError, CheckpointError, NonFiniteLoss, SkippedTooMany, StreamStateError, ImportError) as error:
        sys.exit(f"error: {error}")
    if JSON.value:
        print(json.dumps(result, indent=2))
    print(workdir / "retention.json")
    print(workdir / "report.html")


if __name__ == "__main__":
    app.run(main)
