"""The console script `vocojax`: finds the command that its first argument names and runs it."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

import vocojax
from vocojax.cli import runner

VERBS = {  # verb -> its module in `vocojax.cli`
    "train": "train",
    "config": "config",
    "check_data": "check_data",
    "checkpoints": "checkpoints",
    "answer": "answer",
    "compress": "compress",
    "convert": "convert",
    "evaluate": "evaluate",
    "report": "compile_report",
    "rehearse": "rehearse",
    "efficiency": "efficiency",
    "agreement": "agreement",
    "calibrate": "calibrate",
    "kernel_report": "kernel_report",
    "data_report": "data_report",
    "step_report": "step_report",
    "prepare_data": "prepare_data",
    "quickstart": "quickstart",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `vocojax VERB [FLAGS]` and exits."""
    arguments = list(sys.argv if argv is None else argv)[1:]
    if arguments[:1] == ["help"] and len(arguments) == 2:
        arguments = [arguments[1], "--help"]
    verb = arguments[0].replace("-", "_") if arguments and not arguments[0].startswith("-") else ""
    if verb in VERBS:
        runner.run(command(verb), [f"vocojax {verb}", *arguments[1:]])
    elif "--version" in arguments:
        print(f"vocojax {vocojax.__version__}")
    elif runner.asks_for_help(arguments) or arguments == ["help"]:
        runner.show(help_text())
    else:
        sys.exit(f"error: {_problem(arguments, verb)}; vocojax --help lists the verbs")


def command(verb: str) -> ModuleType:
    """Returns the module of a verb."""
    return importlib.import_module(f"vocojax.cli.{VERBS[verb]}")


def help_text() -> str:
    """Returns the list of verbs, each with the first line of its help."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {(command(verb).__doc__ or '').splitlines()[0]}" for verb in VERBS]
    return "\n".join(["Usage: vocojax VERB [FLAGS]", "", *lines, "", "vocojax VERB --help describes a verb's flags."])


def _problem(arguments: Sequence[str], verb: str) -> str:
    if not arguments:
        return "a verb is missing: vocojax VERB [FLAGS]"
    if not verb:
        return f"the verb comes first: vocojax VERB [FLAGS], got {arguments[0]}"
    near = difflib.get_close_matches(verb, VERBS, n=1)
    return f"unknown verb {arguments[0]!r}" + (f", did you mean {near[0]}?" if near else "")


if __name__ == "__main__":
    main()
