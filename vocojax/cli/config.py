"""Lists every key of a stage's config, or the stages and presets there are.

    vocojax config                                            # the stages of configs/ and the presets of models
    vocojax config voco                                       # every key: value in force, type, default, meaning
    vocojax config voco data                                  # only those that begin with `data`
    vocojax config --config=configs/voco.py:clip_l_336_vicuna_13b --config.batch_size=128 --print_config    # as JSON

`--config.help` and `--print_config` do the same for the flags of `vocojax train`.
"""

from collections.abc import Sequence

from absl import flags

from vocojax.cli import config_flag
from vocojax.cli.flag_checks import refuse_arguments

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
        print(config_flag.reference(FLAGS, *words[1:]))
    else:
        print(config_flag.stages_there_are())
        print("`vocojax config STAGE` lists the keys of one; STAGE:PRESET is the same stage with another model")
