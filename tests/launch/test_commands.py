"""The console script and the scripts of launch/: help, mistakes and paths, before anything heavy is loaded."""

import os
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from absl import flags

from vocojax.cli import runner
from vocojax.cli.main import VERBS

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.py"))
CONSOLE = (sys.executable, "-m", "vocojax.cli.main")
HEAVY = ("jax", "flax", "transformers", "orbax", "grain", "numba", "numpy")
CPU_SECONDS = 1.5


def run(*command, cwd=ROOT, **environment):
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=120, env={
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment})


def timed(*command, **options):
    """Runs a command; returns it and the CPU-seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(*command, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_lists_every_verb_in_a_line():
    done, seconds = timed(*CONSOLE, "--help")
    assert done.returncode == 0 and done.stderr == "" and seconds < CPU_SECONDS
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [verb for verb, _ in lines] == list(VERBS)
    assert all(summary.endswith(".") and len(summary) <= 90 for _, summary in lines), lines


@pytest.mark.parametrize("command", [*((*CONSOLE, verb) for verb in VERBS), *((sys.executable, x) for x in SCRIPTS)],
                         ids=lambda command: Path(str(command[-1])).name)
def test_help_comes_before_anything_heavy(command, tmp_path):
    if len(command) == 2:  # a script, which says at its end what it has imported
        code = "import sys, runpy; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n" \
               f"except SystemExit as end: print(end.code or 0, sorted(set({HEAVY}) & set(sys.modules)))"
        command = (sys.executable, "-c", code, command[1])
    done, seconds = timed(*command, "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and "\nFlags:\n" in done.stdout
    assert seconds < CPU_SECONDS
    takes_a_config = Path(command[-1]).stem in ("train", "check_data", "report", "compile_report", "rehearse")
    assert not takes_a_config or ("  --config: " in done.stdout and "--[no]print_config: " in done.stdout)
    assert command[1] != "-c" or done.stdout.endswith("\n0 []\n")


def test_every_script_is_a_verb():
    assert {script.stem for script in SCRIPTS} == set(VERBS.values())


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", f"--config={ROOT}/configs/voco.py", "--config.step=4", "--workdir=x"],
     "error: --config.step is not a key of the config; did you mean steps?"),
    (["answer", "--chekpoint=x"], "error: Unknown command line flag 'chekpoint'. Did you mean: checkpoint ?"),
    (["train", f"--config={ROOT}/configs/voco.py", "--wrkdir=x"], "error: Unknown command line flag 'wrkdir'"),
    (["answer", "--store=x", "--checkpoint=y", "now"], "error: unexpected arguments: now"),
    (["compress", "--images=a", "b.jpg", "--checkpoint=y", "--store=s"], "(is the glob in quotes?): b.jpg"),
    (["answer", "--store=x", "--checkpoint=y", "--image=z"], "error: give --image and --question, or"),
    (["efficiency", f"--config={ROOT}/configs/voco.py", "--vocos=0"], "--vocos must be whole numbers >= 1"),
    (["convert", "--source=a", "--target=b"], "--target_layout must have a value"),
    (["train", "--workdir=x", "--config=nowhere.py"], "error: --config=nowhere.py: there is no such file; "),
    (["evaluate", "--data_root=x"], "error: --benchmarks is missing"),
    (["evaluate", "--benchmarks=gqa"], "error: give --checkpoint to answer with a model, or --predictions"),
    (["anwser"], "error: unknown verb 'anwser', did you mean answer?"),
    (["--store=x", "answer"], "error: the verb comes first"),
    ([], "error: a verb is missing"),
])
def test_mistakes_are_one_line_and_fast(arguments, message, tmp_path):
    done, seconds = timed(*CONSOLE, *arguments, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert seconds < 2 * CPU_SECONDS if "--config" in str(arguments) else seconds < CPU_SECONDS


@pytest.mark.parametrize("form", [
    ["--questions", "my questions.jsonl", "--checkpoint", "no weights", "--store=my store"],
    ["--store", "my store", "--checkpoint=no weights", "--questions=my questions.jsonl"],
])
def test_flags_in_any_order_and_form_and_paths_with_spaces(form, tmp_path):
    (tmp_path / "my questions.jsonl").write_text('{"image": "a.png", "question": "what is it?"}')
    done = run(*CONSOLE, "answer", *form, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: no weights"), done.stderr


def test_a_checkout_in_a_directory_with_a_space_runs_from_anywhere(tmp_path):
    checkout = tmp_path / "my checkout"
    for name in ("vocojax", "configs", "launch"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    script = checkout / "launch" / "train.py"
    done = run(sys.executable, script, "--config", checkout / "configs" / "voco.py", "--workdir", tmp_path / "my run",
               "--config.data.path=none", PYTHONPATH="")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {checkout}/configs/voco.py: data.tokenizer must name a tokenizer directory")


def test_a_fault_of_the_program_is_a_traceback(tmp_path):
    """Only what the user can mend is one line."""
    code = "import sys\nfrom vocojax.cli import runner, convert\nfrom vocojax.errors import InputError\n" \
           "def main(arguments): raise (ValueError if 'fault' in sys.argv[2] else InputError)('of\\na kind')\n" \
           "convert.main = main\nrunner.run(convert)"
    flags = ["--source=x", "--target=y", "--target_layout=orbax"]
    mended, fault = (run(sys.executable, "-c", code, *flags[:1], f"--target={name}", flags[2])
                     for name in ("user", "fault"))
    assert mended.returncode == 1 and mended.stderr == "error: of a kind\n"
    assert fault.returncode == 1 and "Traceback" in fault.stderr and "ValueError: of" in fault.stderr


@pytest.mark.parametrize(("arguments", "rest"), [
    (["--", "--runner=x", "y"], ["--", "--runner=x", "y"]),
    (["--target=a", "--", "--runner=x"], ["--", "--runner=x"]),
    (["--target=a"], []),
    (["--target=a", "--"], []),
    (["photo", "--target=a"], ["photo"]),
    (["photo", "--", "--runner=x"], ["photo", "--runner=x"]),
])
def test_arguments_of_another_program_begin_with_the_two_dashes(monkeypatch, arguments, rest):
    values = flags.FlagValues()
    flags.DEFINE_string("target", None, "A flag.", flag_values=values)
    monkeypatch.setattr(runner.flags, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", ["pytest"])  # another program's
    assert runner._parse_flags(["vocojax prepare_data", *arguments]) == ["vocojax prepare_data", *rest]


def test_other_commands_do_not_see_the_two_dashes(monkeypatch):
    monkeypatch.setattr(runner, "show_own_messages", lambda: None)
    taken = []
    command = types.SimpleNamespace(main=taken.append)
    runner._run_main(command, ["--", "photo"])
    command.HANDS_ARGUMENTS_ON = True
    runner._run_main(command, ["--", "photo"])
    assert taken == [["photo"], ["--", "photo"]]


CONFIG_FILE = """from vocojax.config import ConfigError
from vocojax.layout import LayoutError

def get_config(which=""):
    if which == "layout":
        raise LayoutError("record", "is bad", "bad")
    if which == "unicode":
        b"\\xff".decode()
    if which == "name":
        return unknown
    raise ConfigError("model.voco", "must be better")
"""


@pytest.mark.parametrize(("which", "message"), [
    ("", "line 11: model.voco must be better;"), ("layout", "line 6: record 'record': is bad;"),
    ("unicode", "line 8: UnicodeDecodeError: 'utf-8' codec"), ("name", "line 10: NameError: name 'unknown'"),
])
def test_what_a_config_file_raises_is_one_line_that_names_the_file(tmp_path, which, message):
    (tmp_path / "own.py").write_text(CONFIG_FILE)
    config = f"{tmp_path}/own.py" + (f":{which}" if which else "")
    done = run(*CONSOLE, "train", f"--config={config}", "--workdir=x", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(f"error: --config={config}, {message}")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("; mend the file, or what follows its name\n")


def test_a_platform_without_plug_in_is_one_line(tmp_path):
    done = run(*CONSOLE, "answer", "--checkpoint=x", "--store=s", "--image=a", "--question=b", "--mesh=1", cwd=tmp_path,
               JAX_PLATFORMS="cuda")
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: JAX_PLATFORMS is 'cuda', and JAX can't use that here")
    assert "unset it, or install the platform's plug-in" in line and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--config=voco", "--config.help"), ("config", "voco")])
def test_output_that_nobody_reads_any_more_ends_a_command_quietly(arguments):
    read, write = os.pipe()
    os.close(read)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*CONSOLE, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120,
                          cwd=ROOT, env=environment)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""
