"""Runs one command: its help, its flags, its messages and its errors."""

import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

from vocojax.cli import config_flag
from vocojax.config.reader import ConfigError
from vocojax.errors import InputError, VocojaxError, os_problem

HELP_FLAGS = {"-h", "-help", "--help", "-?", "--helpshort", "--helpfull"}


def run(command: ModuleType, argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 for success, 1 after one line on stderr for an error that the user can mend.

    Any other exception is a fault of the program and ends it with a traceback.

    Args:
      command: a module of `vocojax.cli` with `define_flags` and `main`, which takes the arguments that are no flags.
        With `HANDS_ARGUMENTS_ON`, a `--` before them is the first one: they are another program's.
      argv: the program's name and its arguments; those of this process by default.
    """
    program, *arguments = sys.argv if argv is None else argv
    _prepare_process()
    command.define_flags()
    if asks_for_help(arguments):
        show(help_text(command))
        sys.exit()
    if "config" in flags.FLAGS:
        _prepare_config(arguments)
    app.run(lambda rest: _run_main(command, rest[1:]), argv=[program, *arguments], flags_parser=_parse_flags)


def _prepare_config(arguments: Sequence[str]) -> None:
    """Defines a flag for each key of the config among the arguments, or answers a question about the config."""
    try:
        if text := config_flag.answer(arguments):
            show(text)
            sys.exit()
        config_flag.define_keys(arguments)
    except (VocojaxError, flags.Error) as error:
        _end_by_mistake(one_line(error))


def show(text: str) -> None:
    """Prints a text. The process ends if nobody reads any more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _end_without_readers()


def _end_without_readers() -> NoReturn:
    """Ends the process because whoever reads its output, such as `head`, has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at the end, and must not fail
    sys.exit(1)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Returns whether one of the arguments before `--` is a flag for help."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return not HELP_FLAGS.isdisjoint(own)


def help_text(command: ModuleType) -> str:
    """Returns a command's docstring and its flags."""
    assert command.__doc__
    modules = [command, config_flag] if "config" in flags.FLAGS else [command]
    described = [flags.FLAGS.module_help(module).partition(":\n")[2] for module in modules]  # after the module's name
    return "\n\n".join([command.__doc__.strip(), "Flags:\n" + "\n\n".join(described)])


def one_line(error: BaseException) -> str:
    """Returns an error's message in one line."""
    return " ".join(line.strip() for line in str(error).splitlines())


def _prepare_process() -> None:
    """Makes a process independent of the terminal's encoding and of JAX_ENABLE_X64; dtypes are the config's."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what can't be shown must not end a command
    os.environ["JAX_ENABLE_X64"] = "0"


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags. Returns the program's name and the other arguments, with the `--` that comes before them."""
    try:
        program, *rest = flags.FLAGS(argv)
    except flags.Error as error:
        _end_by_mistake(f"{one_line(error)} (--help lists the flags)")
    before = argv[len(argv) - len(rest) - 1]
    return [program, before, *rest] if rest and before == "--" else [program, *rest]


def _end_by_mistake(message: str) -> NoReturn:
    """Ends the process after a mistake in flags, the config or what it names, which no second start mends.

    The status is 1, or VOCOJAX_MISTAKE_STATUS: whatever starts runs again can tell a mistake from a failure by it.
    """
    print(f"error: {message}", file=sys.stderr)
    sys.exit(int(os.environ.get("VOCOJAX_MISTAKE_STATUS") or 1))


def _run_main(command: ModuleType, arguments: list[str]) -> None:
    if arguments[:1] == ["--"] and not getattr(command, "HANDS_ARGUMENTS_ON", False):
        arguments = arguments[1:]
    show_own_messages()
    try:
        command.main(arguments)
        sys.stdout.flush()
    except (ConfigError, InputError, app.UsageError) as error:
        _end_by_mistake(one_line(error))
    except VocojaxError as error:
        sys.exit(f"error: {one_line(error)}")
    except BrokenPipeError:
        _end_without_readers()
    except OSError as error:
        sys.exit(f"error: {' '.join(os_problem(error).split())}")
    except (RuntimeError, AssertionError) as error:
        asked_for = os.environ.get("JAX_PLATFORMS", "")
        if not asked_for or not _raised_by_backends(error):
            raise
        sys.exit(f"error: JAX_PLATFORMS is {asked_for!r}, and JAX can't use that here"
                 f"{': ' * bool(str(error))}{one_line(error)}; unset it, or install the platform's plug-in "
                 "(pip install -e '.[cuda]' or -e '.[tpu]')")


def _raised_by_backends(error: BaseException) -> bool:
    """Returns whether JAX raised an error while it looked for its backends: by its version, several types."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return last.filename.endswith("xla_bridge.py")


def show_own_messages() -> None:
    """Shows this package's messages from INFO on, those of libraries (Orbax reports every file) from WARNING on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("vocojax").setLevel(logging.INFO)
    # A failed write of a checkpoint is reported once, by the run: Orbax logs it with a traceback in addition, and
    # TensorStore's writes that are still under way find Orbax's event loop closed.
    absl_logging.get_absl_handler().addFilter(lambda record: "_SignalingThread.run() raised" not in record.getMessage())
    sys.unraisablehook = _report_unraisable


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
