"""The strict reader of configurations, which builds frozen dataclasses from nested mappings.

Each dataclass checks its own values. Every error names its key as a user writes it
(`model.voco.num_vocos must be >= 1, got 0`).
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from vocojax.errors import VocojaxError, shown

T = TypeVar("T")
SEEDS = 2**32  # seeds are whole numbers below it


class ConfigError(VocojaxError, ValueError):
    """An invalid value of a configuration.

    Attributes:
      key: dotted path of the value in the config that was being built.
      problem: what is wrong with the value; empty if `key` is a whole message (absl builds such errors from messages).
    """

    def __init__(self, key: str, problem: str = ""):
        self.key, self.problem = key, problem
        super().__init__(key, problem)  # pickling builds the error again from these arguments

    def __str__(self) -> str:
        return f"{self.key} {self.problem}".rstrip()


def require(condition: bool, key: str, problem: str, value: Any) -> None:
    """Raises `ConfigError("KEY PROBLEM, got VALUE")` unless the condition holds."""
    if not condition:
        raise ConfigError(key, f"{problem}, got {shown(value)}")


def require_positive(config: Any, *keys: str) -> None:
    """Raises `ConfigError` for the first of these integer fields that is below 1."""
    for key in keys:
        require(getattr(config, key) >= 1, key, "must be >= 1", getattr(config, key))


def require_seed(seed: Any, key: str = "seed") -> None:
    """Raises `ConfigError` unless the value is a seed: a whole number in [0, 2**32)."""
    require(isinstance(seed, int) and not isinstance(seed, bool), key, "must be a whole number", seed)
    require(0 <= seed < SEEDS, key, "must be in [0, 2**32)", seed)


def require_positive_number(config: Any, *keys: str) -> None:
    """Raises `ConfigError` for the first of these number fields that is not above 0, or not finite."""
    for key in keys:
        value = getattr(config, key)
        require(0 < value < math.inf, key, "must be a finite number above 0", value)


def build(cls: type[T], values: Mapping[str, Any], key: str = "") -> T:
    """Builds the dataclass `cls` from a nested mapping.

    Args:
      cls: a frozen dataclass whose fields are scalars, Literals, dataclasses, tuples of these, or unions.
      values: values of the fields; missing fields have their defaults. Lists become tuples.
      key: dotted path of `values` in the whole config, for errors.

    Raises:
      ConfigError: a key is unknown (the message suggests the nearest known one), or a value has the wrong type or is
        out of range.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments = {}
    for name, value in values.items():
        path = f"{key}.{name}" if key else name
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
            raise ConfigError(path, f"is not a key of {cls.__name__}{hint}")
        arguments[name] = _convert(known[name], value, path)
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{key}.{error.key}" if key else error.key, error.problem) from None
    except TypeError as error:
        raise ConfigError(key or cls.__name__, f"is incomplete: {error}") from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _convert_to_one([option for option in options if option is not type(None)], value, path)
    if origin is Literal:
        if value not in options:
            raise ConfigError(path, f"must be one of {', '.join(map(repr, options))}, got {shown(value)}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(path, f"must be a list, got {shown(value)}")
        hints = [options[0]] * len(value) if options[-1] is Ellipsis else options
        if len(hints) != len(value):
            raise ConfigError(path, f"must be a list of {len(hints)}, got {shown(value)}")
        return tuple(_convert(item_hint, item, f"{path}[{i}]")
                     for i, (item_hint, item) in enumerate(zip(hints, value, strict=True)))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(path, f"must be a mapping with the keys of {hint.__name__}, got {shown(value)}")  # type: ignore[union-attr]
        return build(hint, value, path)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(path, f"must be a finite number, got {value!r}")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(path, f"must be of type {hint.__name__}, got {shown(value)}")
    return value


def _convert_to_one(hints: list[Any], value: Any, path: str) -> Any:
    """Returns the value converted to the first type in `hints` that accepts it."""
    problems = []
    for hint in hints:
        try:
            return _convert(hint, value, path)
        except ConfigError as error:
            if len(hints) == 1:
                raise
            problems.append(error.problem.rpartition(", got ")[0])
    raise ConfigError(path, f"{' or '.join(problems)}, got {shown(value)}")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Returns a dataclass config as nested dicts and lists, which JSON can hold and `build` can read."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the dotted keys at which two nested dicts differ."""
    keys: list[str] = []
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differing_keys(a, b, f"{prefix}{name}.")
        elif a != b:
            keys.append(prefix + name)
    return keys
