"""The wheel, where there is no checkout: its console script trains, converts, compresses and answers, quietly."""

import dataclasses
import json
import os
import re
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

import vocojax
from tests.helpers.environment import on_cpu
from tests.helpers.wheel import PIP, build_wheel
from vocojax.config import config_to_dict

pytest.importorskip("setuptools")
CONFIG = """
import json
from pathlib import Path
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads(Path(__file__).with_suffix(".json").read_text()))
"""
# What no successful command prints, whoever warns: absl, Python, Orbax, transformers.
WARNING = re.compile(r"^[WEF]\d{4} |warning|deprecated|You are using a model|not exist", re.IGNORECASE)
MESSAGE = re.compile(r"I\d{4} [\d:.]+ +\d+ \w+\.py:\d+\] ")  # of this package, from INFO on


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An empty environment with the wheel; what it needs is seen where it is, so that nothing is downloaded."""
    root = tmp_path_factory.mktemp("wheel")
    environment = root / "environment"
    wheel = build_wheel(root)
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    subprocess.run([*PIP, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    packages = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                              capture_output=True, text=True).stdout.strip()
    Path(packages, "present.pth").write_text(sysconfig.get_path("purelib"))  # which does not follow links in it
    return environment / "bin" / "vocojax"


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """Runs a verb in an empty directory; on stderr there must be no warning."""
    directory = tmp_path_factory.mktemp("work")

    def run(*arguments):
        done = subprocess.run([installed, *map(str, arguments)], cwd=directory, capture_output=True, text=True, env={
            "PATH": os.environ["PATH"], "HOME": str(directory), **on_cpu(), "PYTHONPATH": ""})  # no checkout
        assert done.returncode == 0, done.stderr
        lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
        assert not any(WARNING.search(line) for line in lines), done.stderr
        if arguments[0] != "train":  # whose messages, such as the table of parameters, have several lines
            assert all(is_progress(line) or MESSAGE.match(line) for line in lines), done.stderr
        return done.stdout

    run.directory = directory
    return run


def is_progress(line):
    """Returns whether a line is a progress bar's, or the cursor's way to one."""
    return re.search(r"\d+%\||\d+it \[|\x1b\[A", line) is not None


@pytest.fixture
def trained(run, stage):
    """A run of one step by the console script; it is not repeated."""
    stage = dataclasses.replace(stage, learning_rates=((".*", 1.0),))  # random parameters that are frozen are warned of
    (run.directory / "my config.json").write_text(json.dumps(config_to_dict(stage)))
    (run.directory / "my config.py").write_text(CONFIG)
    workdir = run.directory / "my run"
    if not workdir.exists():
        run("train", "--config", "my config.py", "--workdir=my run", "--config.steps=1", "--config.log_every", "1")
    return workdir


def test_the_wheel_trains_exports_and_answers(run, trained, llava_data):
    (line,) = (trained / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["loss"] < 20
    run("convert", "--source=my run", "--target=export", "--target_layout=huggingface")
    assert (run.directory / "export" / "modeling_voco_llava.py").exists()  # a file of the package's that is no module
    image = llava_data / "images" / "0.png"
    ask = ["--image", image, "--question=what color is the shape?", "--max_new_tokens=4"]
    answer = run("answer", "--checkpoint=export", "--store=export caches", *ask)
    assert answer.endswith("\n")


@pytest.mark.slow
def test_the_wheel_converts_to_every_layout_and_answers_from_a_store(run, trained, llava_data):
    image = llava_data / "images" / "0.png"
    stored = run("compress", "--images", image, "--checkpoint=my run", "--store=caches")
    assert "caches: 1 compressed" in stored, stored
    ask = ["--store=caches", "--image", image, "--question=what color is the shape?", "--max_new_tokens=4"]
    answer = run("answer", "--checkpoint=my run", *ask)
    assert answer.endswith("\n")
    for layout in ("orbax", "huggingface", "llava"):
        run("convert", "--source=my run", "--target", layout, "--target_layout", layout, "--verify")
    assert run("answer", "--checkpoint=llava", *ask) == answer
    questions = run.directory / "questions.jsonl"
    questions.write_text(json.dumps({"image": str(image), "question": "what color is the shape?"}))
    lines = run("answer", "--questions", questions, "--checkpoint=my run", "--store=caches", "--max_new_tokens", 4)
    assert json.loads(lines)["answer"] == answer.rstrip("\n")


def test_the_wheel_holds_the_stages(run):
    listed = run("config", "--config=voco:clip_l_336_vicuna_13b", "--config.batch_size=16", "--print_config")
    values = json.loads(listed)
    assert (values["batch_size"], values["model"]["decoder"]["width"]) == (16, 5120)
    assert run("--version") == f"vocojax {vocojax.__version__}\n"
