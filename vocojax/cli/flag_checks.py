"""Checks of flags, made before any work."""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags


def refuse_arguments(arguments: Sequence[str], hint: str = "") -> None:
    """Raises `UsageError` if there are arguments that are no flags."""
    if arguments:
        raise app.UsageError(f"unexpected arguments{hint}: {' '.join(arguments[:4])}{' ...' * (len(arguments) > 4)}; "
                             "every setting is a flag, and --help lists them")


def refuse_empty(*names: str) -> None:
    """Makes it an error that a text flag, or one of its several values, is ''."""
    for name in names:
        flags.register_validator(name, lambda value: all(value) if isinstance(value, list) else value != "",
                                 "must not be empty")


def require_writable(name: str) -> None:
    """Makes it an error that the file which a flag names can't be written."""
    flags.register_validator(name, lambda path: path is None or _can_be_written(Path(path)),
                             "must name a file that can be written, in a directory that is there")


def _can_be_written(path: Path) -> bool:
    return not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
