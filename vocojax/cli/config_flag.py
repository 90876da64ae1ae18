"""The flag `--config` with a stage's file, a flag `--config.KEY` for each of its keys, and the list of all keys."""

import difflib
import importlib.util
import json
import re
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from vocojax.errors import InputError, VocojaxError

if TYPE_CHECKING:
    from vocojax.training.config import StageConfig

CHECKOUT = Path(__file__).resolve().parents[2]
HELP, PRINT = "config.help", "print_config"


def define_config(meaning: str, is_required: bool = True, values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines `--config` and `--print_config`.

    Args:
      meaning: what the command reads of the config.
      is_required: whether the command needs one.
      values: where the flags are defined.
    """
    flags.DEFINE_string("config", None, f"{meaning} FILE.py or FILE.py:PRESET; of configs/FILE.py the name FILE is "
                        "enough. --config.KEY=VALUE sets a key, --config.help lists all keys.", flag_values=values)
    flags.DEFINE_bool(PRINT, False, "Print the config with all keys as JSON, and stop.", flag_values=values)
    if is_required:
        flags.mark_flag_as_required("config", flag_values=values)


def define_keys(arguments: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines a flag for each `--config.KEY` among the arguments.

    Raises:
      ConfigError: there is no such key.
    """
    found = [re.fullmatch(r"--?config\.([^=]+)(=.*)?", argument, re.DOTALL) for argument in arguments]
    names = dict.fromkeys(match[1] for match in found if match)
    if not names.keys() - {"help"}:
        return
    from vocojax.config.keys import find_hint
    from vocojax.config.reader import ConfigError
    from vocojax.training.config import StageConfig

    for name in names.keys() - {"help"}:
        try:
            hint = find_hint(StageConfig, name)
        except ConfigError as error:
            raise ConfigError(f"--config.{error.key}", error.problem) from None
        if hint is bool:
            flags.DEFINE_bool(f"config.{name}", None, "A key of the config.", flag_values=values)
        else:
            flags.DEFINE_multi_string(f"config.{name}", None, "A key of the config.", flag_values=values)


def config_values(values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """Returns the config that the flags name, as nested dicts: what its file says, and the keys set by flags over it.

    Raises:
      InputError: the file is missing, or fails.
      ConfigError: a flag's value can't be read.
    """
    from vocojax.config.keys import find_hint, set_value, value_of
    from vocojax.training.config import StageConfig

    name = _name(values)
    config = _call(name)
    keys = [flag.removeprefix("config.") for flag in values if flag.startswith("config.")]
    for key in sorted(keys, key=lambda key: key.count(".")):  # a section comes before its own keys
        given = values[f"config.{key}"].value
        if given is None:
            continue
        value = value_of(find_hint(StageConfig, key), given, f"--config.{key}") if isinstance(given, list) else given
        if hasattr(config, "ignore_type"):  # an ml_collections.ConfigDict: the dataclasses check types
            with config.ignore_type(), config.unlocked():
                set_value(config, key, value)
        else:
            set_value(config, key, value)
    if not hasattr(config, "to_json"):
        return dict(config)
    try:
        return json.loads(config.copy_and_resolve_references().to_json())
    except Exception as error:  # a value that JSON can't hold, or one that the file left for the flags to set
        raise InputError(f"--config={name}: {_problem(error)}") from error


def stage(values: flags.FlagValues = flags.FLAGS) -> "StageConfig":
    """Returns the stage's config that the flags name.

    Raises:
      InputError, ConfigError: as `config_values`, or a value is wrong.
    """
    from vocojax.training.config import stage_config

    return stage_config(config_values(values), _name(values))


def answer(arguments: Sequence[str]) -> str:
    """Returns what `--config.help` or `--print_config` among the arguments asks for; '' if neither is there.

    Other flags are not looked at: those that a command needs may be missing.
    """
    asks_for_help = not {f"--{HELP}", f"-{HELP}"}.isdisjoint(arguments)
    if not asks_for_help and not {f"--{PRINT}", f"-{PRINT}", f"--{PRINT}=true"} & set(arguments):
        return ""
    values = flags.FlagValues()
    define_config("", False, values)
    flags.DEFINE_bool(HELP, False, "", flag_values=values)
    define_keys(arguments, values)
    own = [word for word, before in zip(arguments, ["", *arguments], strict=False)
           if word.lstrip("-").startswith(("config", PRINT)) or re.fullmatch(r"--?config[^=]*", before)]
    values(["config", *own])
    if values["config"].value is None and arguments and not arguments[0].startswith("-"):
        values["config"].value = arguments[0]  # vocojax config STAGE
    if asks_for_help:
        return reference(values)
    if values["config"].value is None:
        raise InputError(f"--{PRINT} needs --config=FILE.py; {stages_there_are()}")
    from vocojax.training.config import all_keys

    return json.dumps(all_keys(**config_values(values)), indent=2)


def reference(values: flags.FlagValues, part: str = "") -> str:
    """Returns the list of all keys: meaning, type, default, and the value in force if a config is named.

    Args:
      values: flags that may name a config.
      part: only keys that begin with it, or that it is a part of.
    """
    from vocojax.config.keys import keys_of
    from vocojax.training.config import StageConfig, all_keys

    named = values["config"].value
    in_force = all_keys(**config_values(values)) if named else None
    keys = [key for key in keys_of(StageConfig) if key.path.startswith(part)]
    keys = keys or [key for key in keys_of(StageConfig) if part in key.path]
    if not keys:
        raise InputError(f"no key of the config begins with {part!r} or holds it: `vocojax config` lists all")
    lines = [f"Keys of {named or 'a config'}, each a flag --config.KEY=VALUE."
             + (" * marks values that are not the default." if named else ""), ""]
    for key in keys:
        if key.is_section:
            is_none = in_force is not None and "[]" not in key.path and _value(in_force, key.path) == "none"
            lines += ["", f"[{key.path}]{' is none; these are the values where it is set' * is_none}"]
        else:
            default = "none" if key.default is None else json.dumps(_plain(key.default))
            value = default
            if in_force is not None and "[]" not in key.path and _section_is_there(in_force, key.path):
                value = _value(in_force, key.path)
            lines.append(f"{'*' if value != default else ' '} {key.path} = {value}")
            lines.append(f"      {key.kind}" + (f"; default {default}" if value != default else ""))
        lines += textwrap.wrap(key.meaning, 110, initial_indent="      ", subsequent_indent="      ",
                               break_on_hyphens=False)
    return "\n".join(lines)


def _name(values: flags.FlagValues) -> str:
    return str(values["config"].value)


def stages_there_are() -> str:
    """Returns a line that lists the stages and the presets of models."""
    from vocojax.config import PRESETS

    return (f"stages: {', '.join(path.stem for path in stage_files()) or 'none in this directory'}; presets of models: "
            f"{', '.join(PRESETS)}")


def stage_files() -> list[Path]:
    """Returns the files of the stages there are."""
    folder = next((folder for folder in _folders() if folder.is_dir()), None)
    return sorted(folder.glob("*.py")) if folder else []


def _section_is_there(config: Mapping[str, Any], path: str) -> bool:
    """Returns whether the section of a key has a value; it may be none, as `model.decoder.rope_scaling`."""
    section, _, _ = path.rpartition(".")
    return not section or _value(config, section) != "none"


def _value(config: Mapping[str, Any], path: str) -> str:
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return "none" if value is None else json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, tuple) else value


def _folders() -> tuple[Path, ...]:
    """Returns where stages are looked for: the current directory, this checkout, the installed wheel."""
    return Path("configs"), CHECKOUT / "configs", CHECKOUT / "vocojax" / "configs"


def stage_file(name: str) -> Path:
    """Returns the config file of that name, which may end in `:PRESET`.

    Raises:
      InputError: there is none; the message lists those there are.
    """
    name, _, _ = name.partition(":")
    candidates = [Path(name), *(folder / f"{name}.py" for folder in _folders())]
    if found := next((path for path in candidates if path.is_file()), None):
        return found
    known = [path.stem for folder in _folders() for path in folder.glob("*.py")]
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f"did you mean configs/{near[0]}.py? " if near else ""
    raise InputError(f"--config={name}: there is no such file; {hint}{stages_there_are()}")


def _call(name: str) -> Any:
    """Runs a config file and returns what its `get_config` does.

    Raises:
      InputError: the file is missing, or fails; the message names the line.
    """
    _, _, argument = name.partition(":")
    file = stage_file(name)
    spec = importlib.util.spec_from_file_location("stage_config_file", file)
    if spec is None or spec.loader is None:
        raise InputError(f"--config={name}: must be a Python file with a function get_config, such as configs/voco.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*([argument] if argument else []))
    except Exception as error:  # a config file may raise anything
        raise InputError(f"--config={name}{_place(error, file)}: {_problem(error)}; mend the file, or what follows its "
                         "name") from error
    if not isinstance(config, Mapping) and not hasattr(config, "to_json"):
        raise InputError(f"--config={name}: get_config must return a ConfigDict or a dict, got {type(config).__name__}")
    return config


def _place(error: Exception, file: Path) -> str:
    """Returns `, line N` of the config file that an error came through; '' if it was in none."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if Path(frame.filename).resolve() == file.resolve()]
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == file.resolve():
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


def _problem(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, VocojaxError) else f"{type(error).__name__}: {text}"

