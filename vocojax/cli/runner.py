"""Runs one command: its help, its flags, its messages and its errors."""

import logging
import sys
from collections.abc import Sequence
from types import ModuleType

from absl import app, flags
from absl import logging as absl_logging

from vocojax.errors import VocojaxError

HELP_FLAGS = {"-h", "-help", "--help", "-?", "--helpshort"}


def run(command: ModuleType, argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 for success, 1 after one line on stderr for an error that the user can mend.

    Any other exception is a fault of the program and ends it with a traceback.

    Args:
      command: a module of `vocojax.cli` with `define_flags` and `main`.
      argv: the program's name and its arguments; those of this process by default.
    """
    program, *arguments = sys.argv if argv is None else argv
    command.define_flags()
    if asks_for_help(arguments):
        print(help_text(command))
        sys.exit()
    app.run(lambda rest: _run_main(command, rest[1:]), argv=[program, *arguments], flags_parser=_parse_flags)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Returns whether one of the arguments before `--` is a flag for help."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return not HELP_FLAGS.isdisjoint(own)


def help_text(command: ModuleType) -> str:
    """Returns a command's docstring and its flags."""
    assert command.__doc__
    _, _, described = flags.FLAGS.module_help(command).partition(":\n")  # after the module's name
    return f"{command.__doc__.strip()}\n\nFlags:\n{described}"


def one_line(error: Exception) -> str:
    """Returns an error's message in one line."""
    return " ".join(line.strip() for line in str(error).splitlines())


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {one_line(error)} (--help lists the flags)")
    except AttributeError as error:  # a key that the config does not have
        sys.exit(f"error: --config: {one_line(error)}")
    except (VocojaxError, OSError) as error:  # of a config file, which is read with the flags
        sys.exit(f"error: {one_line(error)}")


def _run_main(command: ModuleType, arguments: list[str]) -> None:
    show_own_messages()
    try:
        command.main(arguments)
    except (VocojaxError, OSError, app.UsageError) as error:
        sys.exit(f"error: {one_line(error)}")


def show_own_messages() -> None:
    """Shows this package's messages from INFO on, those of libraries (Orbax reports every file) from WARNING on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("vocojax").setLevel(logging.INFO)
