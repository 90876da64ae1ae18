"""Every stage's config file opens with the commands that run it, and those are right."""

import ast
import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from absl import flags

from vocojax.cli import config as command
from vocojax.cli import config_flag
from vocojax.config import PRESETS, ConfigError, preset
from vocojax.config.keys import keys_of
from vocojax.errors import InputError
from vocojax.training.config import StageConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def read(*arguments: str) -> StageConfig:
    """Returns what launch/train.py makes of its `--config` arguments."""
    values = flags.FlagValues()
    config_flag.define_config("The stage.", values=values)
    config_flag.define_keys(arguments, values)
    values(["-", *arguments])
    return config_flag.stage(values)


def commands(name: str) -> list[list[str]]:
    """Returns the arguments of every launch/train.py in a config file's docstring."""
    opening = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
    lines = re.sub(r"\\\n\s+", "", opening).splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("    python launch/train.py")]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_commands_of_the_docstring_are_accepted(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    opening = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
    assert commands(name) or "\n    bash launch/quickstart.sh --" in opening
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
        with pytest.raises(InputError, match=known):
            read(f"--config=configs/{argument}")
    with pytest.raises(InputError, match=r"--config=vocoo: there is no such file; did you mean configs/voco.py\? "
                                         r"stages: alignment, .*voco_lora; presets of models: tiny, clip_l_336_vic"):
        read("--config=vocoo")


def simple(path: str) -> tuple[str, object]:
    """Returns a text for a key of each type, and the value that it means."""
    return {
        "text": ("some text", "some text"), "a whole number": ("7", 7), "a number": ("0.25", 0.25),
        "true or false": ("true", True), "a whole number or none": ("none", None), "text or none": ("none", None),
        "a list, each text": ('("a/.*", "b")', ["a/.*", "b"]), "a list, each a whole number": ("3,4", [3, 4]),
        "a list, each a section": ('[{"source": "webvid", "weight": 0.5}]', [{"source": "webvid", "weight": 0.5}]),
        "a list, each [text, text]": ('[["a", "b"]]', [["a", "b"]]),
        "a list, each [text, a number or freeze]": ('[["a", 1], ("b", "freeze")]'.replace("(", "[").replace(")", "]"),
                                                    [["a", 1], ["b", "freeze"]]),
    }[path]


KEYS = [key for key in keys_of(StageConfig) if not key.is_section and "[]" not in key.path]


def test_every_key_can_be_set_by_a_flag_and_has_a_meaning(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments, wanted = ["--config=voco"], {}
    for key in KEYS:
        assert key.meaning.endswith(".") and "as in `" not in key.meaning, key.path
        text, wanted[key.path] = (key.kind.split(", ")[1],) * 2 if key.kind.startswith("one of") else simple(key.kind)
        arguments.append(f"--config.{key.path}={text}")
    values = flags.FlagValues()
    config_flag.define_config("The stage.", values=values)
    config_flag.define_keys(arguments, values)
    values(["-", *arguments])
    config = config_flag.config_values(values)
    for path, value in wanted.items():
        found = config
        for part in path.split("."):
            found = found[part]
        assert found == value, path


@pytest.mark.parametrize(("texts", "targets"), [
    (['("decoder/.*",)'], ("decoder/.*",)), (["decoder/.*"], ("decoder/.*",)), (["a", "b"], ("a", "b")),
    (['["a", "b"]', "(c|d)"], ("a", "b", "(c|d)")), (["(a|b)/[xy]"], ("(a|b)/[xy]",)),
])
def test_a_list_of_texts_is_one_list_or_repeated_texts(texts, targets, monkeypatch):
    monkeypatch.chdir(ROOT)
    (arguments, *_) = commands("voco_lora")
    config = read(*arguments[:1], *arguments[2:], *(f"--config.lora.targets={text}" for text in texts))
    assert config.lora.targets == targets


@pytest.mark.parametrize(("argument", "message"), [
    ("--config.row_length=4", "--config.row_length is not a key of the config; did you mean data.row_length?"),
    ("--config.mesh.slcie=4", "--config.mesh.slcie is not a key of the config; did you mean mesh.slice?"),
    ("--config.zzzzz=4", "--config.zzzzz is not a key of the config; `vocojax config` lists all keys"),
    ("--config.learning_rates=[vision", "--config.learning_rates must be written as JSON or Python do, in quotes"),
    ("--config.steps=many", "voco: steps must be of type int, got 'many'"),
    ("--config.attention=flash", "voco: attention must be one of ['chunked', 'pallas_gpu', 'pallas_tpu', 'reference']"),
    ("--config.model.decoder.rope_scaling.factor=0.5", "voco: model.decoder.rope_scaling.factor must be >= 1, got 0.5"),
])
def test_a_wrong_key_or_value_is_named(argument, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    (arguments, *_) = commands("voco")
    with pytest.raises(ConfigError, match=re.escape(message)):
        read("--config=voco", *arguments[2:], argument)


def test_the_list_of_keys_shows_what_is_in_force(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = config_flag.answer(["--config=voco:tiny", "--workdir", "w", "--config.batch_size", "8", "--config.help"])
    assert all(f"\n  {key.path} = " in text or f"\n* {key.path} = " in text for key in KEYS)
    assert "* batch_size = 8\n      a whole number; default 128\n      rows per optimizer step." in text
    assert "  data.row_length = 2048\n      a whole number\n      tokens per row;" in text
    assert config_flag.answer(["--config=voco"]) == ""
    assert json.loads(config_flag.answer(["voco", "--config.steps=5", "--print_config"]))["steps"] == 5
    printed = json.loads(config_flag.answer(["--print_config", "--config=voco:tiny", "--config.steps=3"]))
    assert printed["steps"] == 3 and printed["model"]["decoder"]["width"] == 64 == PRESETS["tiny"].decoder.width


def test_the_list_of_keys_of_a_section_that_is_none_marks_nothing(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = config_flag.answer(["--config=voco", "--config.help"])
    assert "\n[model.decoder.rope_scaling] is none; these are the values where it is set\n" in text
    assert "\n  model.decoder.rope_scaling.factor = 8.0\n      a number\n" in text


def test_stages_and_presets_are_listed_with_what_they_are(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    lines = dict(line.strip().split("  ", 1) for line in command.listing().splitlines() if line.startswith("  "))
    assert lines.keys() == {*CONFIGS, *PRESETS}
    assert lines["clip_l_336_vicuna_13b"].strip() == (
        "CLIP at 336 px (24 blocks of width 1024, 576 vision tokens), decoder of 40 blocks of width 5120")
    assert lines["alignment"].strip().startswith("Stage 1: the projector learns ")
    monkeypatch.setattr(command, "FLAGS", values := flags.FlagValues())
    config_flag.define_config("The stage.", is_required=False, values=values)
    values(["config"])
    command.main(["voco:clip_l_336_vicuna_13b"])
    text = capsys.readouterr().out
    assert text.startswith("Stage 2: projector and decoder learn to compress") and "* model.decoder.depth = 40" in text
    assert "--config.model.voco.num_vocos=2 \\\n        --config.data.path=llava" in text


def test_the_best_recipe_without_its_switches_is_the_paper_s_stage(monkeypatch):
    monkeypatch.chdir(ROOT)
    (best, *_), (plain, *_) = commands("voco_7b_best"), commands("voco")
    of_plain = [argument for argument in plain if "num_vocos" not in argument and "workdir" not in argument]
    of_best = [argument for argument in best if "workdir" not in argument]
    recipe = read(*of_best)
    assert (recipe.model.voco.num_vocos, recipe.model.voco.init, recipe.data.fewest_vocos) == (8, "pool", None)
    switched_off = read(*of_best, "--config.model.voco.num_vocos=1", "--config.model.voco.init=learned")
    assert dataclasses.replace(switched_off, name="voco") == read(*of_plain)
