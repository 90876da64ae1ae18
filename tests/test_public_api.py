"""The package as its importers see it: names, their types, one base of its errors, and its old paths."""

import importlib.util
import os
import pkgutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import vocojax
from vocojax import _moved
from vocojax.errors import InputError, MissingPackage, VocojaxError

ROOT = Path(__file__).parent.parent
# Exceptions that are not errors of a user's: a stop that was asked for, and those that the package itself catches.
OTHERS = {
    "vocojax.parallel.preemption.Preempted",
    "vocojax.convert.pickle_files._RefusedError",
    "vocojax.data.sources.arrow_file.DamagedFile",
    "vocojax.files.NotAFile",
}
HARNESSES = "vocojax.evaluation.harnesses."
FOREIGN = {f"{HARNESSES}lmms_eval": "lmms_eval", f"{HARNESSES}registration": "lmms_eval",
           f"{HARNESSES}vlmevalkit": "vlmeval"}  # modules that are imported by a harness alone, and what they import
USER = """
import vocojax
from vocojax import Assistant, Request

def ask(path: str) -> str:
    assistant = vocojax.load(path)
    reveal_type(assistant)
    reveal_type(vocojax.stage_config({}))
    reveal_type(vocojax.convert_weights)
    answers = vocojax.answer_many(assistant, [Request("what is it?", ("a.png",))], vocojax.Store("caches"))
    return next(iter(answers)).text

assistant: Assistant = 1
vocojax.no_such_name
"""


def python(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)})


def exceptions():
    """Yields every exception class that a module of the package defines; what a harness needs may not be installed."""
    for module in pkgutil.walk_packages(vocojax.__path__, "vocojax."):
        if module.name in FOREIGN and importlib.util.find_spec(FOREIGN[module.name]) is None:
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == module.name:
                yield value


def test_every_error_derives_from_the_base():
    found = {f"{error.__module__}.{error.__name__}": error for error in exceptions()}
    assert len(found) > 15 and found.keys() >= OTHERS
    assert {name for name, error in found.items() if not issubclass(error, VocojaxError)} == OTHERS


def test_errors_are_also_what_python_calls_them():
    assert issubclass(InputError, ValueError) and issubclass(MissingPackage, ImportError)


def test_every_public_name_is_there():
    assert 20 <= len(vocojax.__all__) <= 30 and len(set(vocojax.__all__)) == len(vocojax.__all__)
    assert {name for name in vocojax.__all__ if getattr(vocojax, name) is None} == set()
    assert set(vocojax.__all__) <= set(dir(vocojax))
    assert vocojax.load == vocojax.Assistant.from_pretrained
    with pytest.raises(AttributeError, match="module 'vocojax' has no attribute 'lode'"):
        _ = vocojax.lode


def test_importing_the_package_imports_nothing_else():
    done = python("-X", "importtime", "-c", "import vocojax, sys; print(*(m for m in sys.modules if 'vocojax' in m))")
    loaded = {name for name in done.stdout.split() if not name.startswith("__editable__")}
    assert loaded == {"vocojax", "vocojax._moved"}
    microseconds = [int(line.split("|")[1]) for line in done.stderr.splitlines() if line.split("|")[-1] == " vocojax"]
    assert len(microseconds) == 1 and microseconds[0] < 200_000


def test_a_user_s_file_has_types(tmp_path):
    """mypy sees the public names' types although they are imported when they are used.

    Its settings are those of launch/test.sh's run over the package, which leaves what mypy knows in the cache.
    """
    (tmp_path / "user.py").write_text(USER)
    settings = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache")
    done = python("-m", "mypy", *settings, "user.py", cwd=tmp_path)
    assert 'Revealed type is "vocojax.inference.assistant.Assistant"' in done.stdout, done.stdout + done.stderr
    assert 'Revealed type is "vocojax.training.config.StageConfig"' in done.stdout
    assert 'Revealed type is "def (source: ' in done.stdout
    errors = [line for line in done.stdout.splitlines() if "error" in line]
    assert len(errors) == 3 and 'expression has type "int", variable has type "Assistant"' in errors[0], errors
    assert 'Module has no attribute "no_such_name"' in errors[1]
    assert (ROOT / "vocojax" / "py.typed").exists()


@pytest.mark.parametrize("old", _moved.MODULES)
def test_a_module_is_still_found_by_its_old_path(old, monkeypatch):
    new = importlib.import_module(f"vocojax.{_moved.MODULES[old]}")
    monkeypatch.delitem(sys.modules, f"vocojax.{old}", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(f"vocojax.{old}".rpartition(".")[0])  # its package may have moved too
    message = rf"vocojax\.{old} has moved to {new.__name__}; .* version 0\.3"
    with pytest.warns(DeprecationWarning, match=message) as seen:
        module = importlib.import_module(f"vocojax.{old}")
    assert seen[0].filename == importlib.__file__  # whoever imported it
    public = {name: value for name, value in vars(new).items() if not name.startswith("_")}
    assert all(getattr(module, name) is value for name, value in public.items())


@pytest.mark.parametrize("old", _moved.NAMES)
def test_a_name_is_still_found_where_it_was(old):
    home, _, name = old.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"vocojax.{home}")
        new_home, _, new_name = f"vocojax.{_moved.NAMES[old]}".rpartition(".")
        assert getattr(module, name) is getattr(importlib.import_module(new_home), new_name)


def test_a_script_of_version_0_1_is_warned_at_its_own_lines(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from vocojax.inference import cache_files as c\n"
                      "from vocojax.convert.mapping import ConvertError\n"
                      "from vocojax.inference.store import Store\nprint(c.CacheError, ConvertError, Store)\n")
    done = python("-W", "always::DeprecationWarning", script)
    assert done.returncode == 0, done.stderr
    assert "script.py:1: DeprecationWarning: vocojax.inference.cache_files has moved to" in done.stderr
    assert "script.py:3: DeprecationWarning: vocojax.inference.store has moved to" in done.stderr
    missing = python("-c", "import vocojax.inference.no_such_module")
    assert missing.stderr.endswith("No module named 'vocojax.inference.no_such_module'\n")
