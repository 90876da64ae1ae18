"""What launch scripts share: what they show on the terminal besides progress bars and tables, checks of their flags."""

import logging
import os
from pathlib import Path

from absl import flags
from absl import logging as absl_logging


def show_own_messages() -> None:
    """Messages of this package from INFO on; libraries' (Orbax reports every file it touches) from WARNING on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("vocojax").setLevel(logging.INFO)


def refuse_empty(*names: str) -> None:
    """Makes it an error at the start that a text flag, or one of several, is ''."""
    for name in names:
        flags.register_validator(name, lambda value: all(value) if isinstance(value, list) else value != "",
                                 "must not be empty")


def require_writable(name: str) -> None:
    """Makes it an error at the start, not after all the work, that the file which a flag names can't be written."""
    flags.register_validator(name, lambda path: path is None or _can_be_written(Path(path)),
                             "must name a file that can be written, in a directory that is there")


def _can_be_written(path: Path) -> bool:
    return not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
