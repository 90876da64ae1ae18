"""What the package offers to those who import it: its errors have one base."""

import importlib
import pkgutil

import vocojax
from vocojax.errors import InputError, MissingPackage, VocojaxError

# Exceptions that are not errors of a user's: a stop that was asked for, and one that never leaves its module.
OTHERS = {"vocojax.parallel.preemption.Preempted", "vocojax.convert.pickle_files._RefusedError"}


def exceptions():
    """Yields every exception class that a module of the package defines."""
    for module in pkgutil.walk_packages(vocojax.__path__, "vocojax."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == module.name:
                yield value


def test_every_error_derives_from_the_base():
    found = {f"{error.__module__}.{error.__name__}": error for error in exceptions()}
    assert len(found) > 15 and found.keys() >= OTHERS
    assert {name for name, error in found.items() if not issubclass(error, VocojaxError)} == OTHERS


def test_errors_are_also_what_python_calls_them():
    assert issubclass(InputError, ValueError) and issubclass(MissingPackage, ImportError)
