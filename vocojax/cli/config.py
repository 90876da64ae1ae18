"""Lists every key of a stage's config, or the stages and presets there are.

    vocojax config                                            # the stages of configs/ and the presets of models
    vocojax config voco                                       # its commands; every key: value, type, default, meaning
    vocojax config voco data                                  # only those that begin with `data`
    vocojax config --config=configs/voco.py:clip_l_336_vicuna_13b --config.batch_size=128 --print_config    # as JSON

`--config.help` and `--print_config` do the same for the flags of `vocojax train`.
"""

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from vocojax.cli import config_flag
from vocojax.cli.flag_checks import refuse_arguments

if TYPE_CHECKING:
    from vocojax.config import ModelConfig

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    config_flag.define_config("The stage, as the first argument is.", is_required=False)


def main(arguments: Sequence[str]) -> None:
    """Lists the keys of the stage that the first argument names, or those that begin with the second one."""
    words = [*([FLAGS.config] if FLAGS.config else []), *arguments]
    refuse_arguments(words[2:])
    if words:
        FLAGS["config"].value = words[0]
        if not words[1:]:
            print(f"{_docstring(config_flag.stage_file(words[0]))}\n")
        print(config_flag.reference(FLAGS, *words[1:]))
    else:
        print(listing())


def listing() -> str:
    """Returns the stages and the presets of models, a line each."""
    from vocojax.config import PRESETS

    stages = {file.stem: _docstring(file).partition("\n")[0] for file in config_flag.stage_files()}
    presets = {name: _sizes(model) for name, model in PRESETS.items()}
    width = max(map(len, [*stages, *presets]))
    lines = lambda entries: [f"  {name:{width}}  {text}" for name, text in entries.items()]
    return "\n".join([
        "Stages:", *lines(stages), "", "Presets of models:", *lines(presets), "",
        "`vocojax config STAGE` shows the commands that train a stage, and every key with its meaning, type, default",
        "and the value in force. STAGE:PRESET is the same stage with another model. The embedded experiments",
        "(quickstart, quickstart_video, mosaic) take a row of their table in place of a preset.",
    ])


def _sizes(model: "ModelConfig") -> str:
    """Returns the sizes of a model in a line."""
    tower, decoder = model.vision, model.decoder
    return (f"{tower.kind.upper()} at {tower.image_size} px ({tower.depth} blocks of width {tower.width}, "
            f"{tower.num_patches} vision tokens), decoder of {decoder.depth} blocks of width {decoder.width}")


def _docstring(file: Path) -> str:
    """Returns what a stage's file says of itself, without running it; commands have their line breaks."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.sub(r"(?<=\S) {3,}(?=\S)", " \\\\\n        ", text)  # Python joins lines that end in a backslash
