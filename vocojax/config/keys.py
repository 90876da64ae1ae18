"""The keys of a configuration: what each one means, which values it takes, and how a text becomes such a value.

The meanings are read from the docstrings of the dataclasses, which are their one home.
"""

import ast
import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vocojax.config.reader import ConfigError
from vocojax.errors import shown

BOOLS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


@dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Attributes:
      path: dotted, such as `model.voco.num_vocos`; `[]` stands for the items of a list.
      hint: the type of its value.
      default: the value that it has if a config does not name it.
      meaning: what the docstring of its dataclass says.
    """

    path: str
    hint: Any
    default: Any
    meaning: str

    @property
    def is_section(self) -> bool:
        """Whether its value is a mapping with keys of its own."""
        return section(self.hint) is not None

    @property
    def kind(self) -> str:
        """The type of its value, in words."""
        return kind_of(self.hint)


def keys_of(cls: type, prefix: str = "") -> Iterator[Key]:
    """Yields all keys of a config dataclass, in order; a section comes before its own keys."""
    classes = {inner.__name__: inner for inner in _classes(cls)}
    yield from _keys_of(cls, prefix, {name: meanings(inner) for name, inner in classes.items()})


def _keys_of(cls: type, prefix: str, texts: Mapping[str, Mapping[str, str]]) -> Iterator[Key]:
    hints = typing.get_type_hints(cls)
    for entry in dataclasses.fields(cls):
        made = entry.default_factory
        default = entry.default if made is dataclasses.MISSING else made()
        hint, path, meaning = hints[entry.name], prefix + entry.name, texts[cls.__name__][entry.name]
        if other := re.fullmatch(r"as in `(\w+)`\.", meaning):  # so that a meaning has one home
            meaning = texts[other[1]][entry.name]
        yield Key(path, hint, default, meaning)
        if inner := section(hint):
            yield from _keys_of(inner, f"{path}.", texts)
        elif inner := section(_item(hint)):
            yield from _keys_of(inner, f"{path}[].", texts)


def _classes(cls: type) -> Iterator[type]:
    """Yields a config dataclass and those of its sections and of its lists."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        if inner := section(hint) or section(_item(hint)):
            yield from _classes(inner)


def section(hint: Any) -> type | None:
    """Returns the dataclass that a type is or may be; None for every other type."""
    return next((option for option in _options(hint) if isinstance(option, type) and dataclasses.is_dataclass(option)),
                None)


def meanings(cls: type) -> dict[str, str]:
    """Returns what a dataclass's docstring says of its fields, each in one paragraph."""
    _, _, listed = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*|\n)*)", listed.partition("\n\nRaises:")[0], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def kind_of(hint: Any) -> str:
    """Returns a type in words: `a whole number or none`, `one of clip, eva`."""
    if hint is type(None):
        return "none"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(kind_of, typing.get_args(hint)))
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        return str(options[0]) if len(options) == 1 else f"one of {', '.join(map(str, options))}"
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        return f"a list, each {kind_of(items[0])}" if items[-1] is Ellipsis else f"[{', '.join(map(kind_of, items))}]"
    if dataclasses.is_dataclass(hint):
        return "a section"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[hint]


def find_hint(cls: type, path: str) -> Any:
    """Returns the type of a key.

    Raises:
      ConfigError: there is no such key; the message names the nearest.
    """
    known = {key.path: key.hint for key in keys_of(cls)}
    if path in known:
        return known[path]
    name = path.rpartition(".")[2]
    same_name = [other for other in known if other.rpartition(".")[2] == name]
    near = same_name or difflib.get_close_matches(path, known, n=1)
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "`vocojax config` lists all keys"
    raise ConfigError(path, f"is not a key of the config; {hint}")


def value_of(hint: Any, texts: list[str], path: str) -> Any:
    """Reads what the command line gives for a key as a value, which `build` checks.

    Args:
      hint: the type of the key.
      texts: what was given, in order. A list collects all of them; elsewhere the last one counts.
      path: the key, for errors.

    Raises:
      ConfigError: a list or a section is neither JSON nor a Python literal.
    """
    options = _options(hint)
    if options != [hint] and texts[-1].lower() in ("none", "null"):
        return None
    if section(hint):
        return _literal(texts[-1], path, '{"key": value}')
    if _item(hint) is None:
        return _scalar(options, texts[-1])
    values: list[Any] = []
    for text in texts:
        if _item(hint) is str and not _is_list(text):
            values.append(text)
            continue
        read = _literal(text, path, '["one", "two"]' if _item(hint) is str else "[1, 2]")
        values += read if isinstance(read, list | tuple) else [read]
    return values


def _scalar(options: list[Any], text: str) -> Any:
    if bool in options:
        return BOOLS.get(text.lower(), text)
    for number in (int, float):
        if number in options:
            try:
                return number(text)
            except ValueError:
                continue
    return text


def _is_list(text: str) -> bool:
    """Returns whether a text is a list as JSON or Python write it; a regex may begin with a bracket as well."""
    try:
        return isinstance(_read(text), list | tuple)
    except ValueError:
        return False


def _literal(text: str, path: str, example: str) -> Any:
    try:
        return _read(text)
    except ValueError:
        raise ConfigError(path, f"must be written as JSON or Python do, in quotes ('{example}'), got {shown(text)}"
                          ) from None


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"neither JSON nor Python: {error}") from None


def _options(hint: Any) -> list[Any]:
    """Returns the types that a value may have, None left out."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [option for option in typing.get_args(hint) if option is not type(None)] if is_union else [hint]


def _item(hint: Any) -> Any:
    """Returns the type of a list's items; None if it is no list."""
    options = [option for option in _options(hint) if typing.get_origin(option) is tuple]
    return typing.get_args(options[0])[0] if options else None


def set_value(values: Any, path: str, value: Any) -> None:
    """Sets a dotted key of nested mappings; sections that are missing or None are made."""
    *sections, name = path.split(".")
    for part in sections:
        if not isinstance(values.get(part), Mapping) and not hasattr(values.get(part), "items"):
            values[part] = {}
        values = values[part]
    values[name] = value
