"""Every stage's config file opens with the commands that run it, and those are right."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from vocojax.config import preset
from vocojax.training.config import StageConfig, stage_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def read(*arguments: str) -> StageConfig:
    """Returns what launch/train.py makes of its `--config` arguments."""
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["-", *arguments])
    values(["-", *arguments])
    return stage_config(config.value)


def commands(name: str) -> list[list[str]]:
    """Returns the arguments of every launch/train.py in a config file's docstring."""
    opening = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
    lines = re.sub(r"\\\n\s+", "", opening).splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("    python launch/train.py")]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_commands_of_the_docstring_are_accepted(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert commands(name)
    for arguments in commands(name):
        overrides = [argument for argument in arguments if argument.startswith("--config")]
        assert len(overrides) == len(arguments) - 1  # all but --workdir
        config = read(*overrides)
        asked_for = re.match(r"--config=configs/.*\.py:(clip.*)", overrides[0])
        assert config.model.decoder == preset(asked_for[1]).decoder if asked_for else config.name


@pytest.mark.parametrize("form", ['[["vision/.*", 0.1], [".*", 1]]', "(('vision/.*', 0.1), ('.*', 1.0))"])
def test_learning_rates_are_set_on_the_command_line(form, monkeypatch):
    monkeypatch.chdir(ROOT)
    (arguments, *_) = commands("voco")
    config = read(*arguments[:1], *arguments[2:], f"--config.learning_rates={form}")
    assert config.learning_rates == (("vision/.*", 0.1), (".*", 1.0))


def test_an_unknown_stage_or_model_lists_those_there_are(monkeypatch):
    monkeypatch.chdir(ROOT)
    for argument, known in (("voco.py:vicuna", "clip_l_336_vicuna_13b"), ("quickstart.py:voco", "upper_bound")):
        with pytest.raises(flags.IllegalFlagValueError, match=known):
            read(f"--config=configs/{argument}")
