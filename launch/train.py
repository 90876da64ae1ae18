"""Trains one stage: python launch/train.py --config=configs/voco.py --workdir=runs/voco [--config.KEY=VALUE ...]"""

import sys

from absl import app, flags
from ml_collections import config_flags

from vocojax.config import ConfigError
from vocojax.data.loader import SkippedTooMany, StreamStateError
from vocojax.terminal import show_own_messages
from vocojax.training.checkpoints import CheckpointError
from vocojax.training.config import stage_config
from vocojax.training.loop import NonFiniteLoss
from vocojax.training.stage import train

CONFIG = config_flags.DEFINE_config_file("config", None, "The stage's ml_collections file.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and logs go; a run in it is resumed.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    show_own_messages()
    try:
        source = config_flags.get_config_filename(flags.FLAGS["config"])
        train(stage_config(CONFIG.value, source), WORKDIR.value)
    except (ConfigError, CheckpointError, NonFiniteLoss, SkippedTooMany, StreamStateError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
