"""A look before a start: what a dry run says, and what is found before anything is compiled."""

import dataclasses
import functools
import logging

import jax
import pytest

from tests.helpers import run_processes as runs
from vocojax.config import ConfigError
from vocojax.errors import CheckpointError, ConvertError
from vocojax.parallel.mesh import MeshConfig
from vocojax.training import stage as stages
from vocojax.training.config import DistillConfig, ValidationConfig
from vocojax.training.stage import dry_run, train


@pytest.fixture
def no_compilation(monkeypatch):
    """Makes a compilation an error."""
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("something was compiled"))
    monkeypatch.setattr(stages, "_initial_state", lambda *_: pytest.fail("a state was made"))


def lines(banner):
    return dict(line.strip().split("  ", 1) for line in banner.splitlines())


def test_a_dry_run_says_what_a_start_would_do_and_leaves_nothing(stage, tmp_path, llava_data, no_compilation):
    said = {name: text.strip() for name, text in lines(dry_run(stage, tmp_path / "run")).items()}
    assert list(said) == ["stage test", "devices", "parameters", "memory", "step", "optimizer", "epochs", "data",
                          "tokenizer", "template", "weights", "programs"]
    assert said["stage test"] == f"starts, 4 of 4 steps to go, in {tmp_path / 'run'}"
    assert said["devices"] == "1 x cpu of 1 process: slice 1 x data 1 x fsdp 1 x tensor 1"
    assert said["step"].startswith("4 rows x 48 tokens in 1 part: 192 tokens; the first batch is ")
    samples = int(said["step"].split()[-2])
    assert said["epochs"] == f"4 steps read about {4 * samples / 12:.2f} times the 12 records" and 4 <= samples <= 8
    assert said["data"] == f"llava {llava_data / 'records.json'}, files below {llava_data / 'images'}"
    assert said["weights"] == "random (init_from is empty)" and said["template"] == "short"
    trained, frozen = (int(word.replace(",", "")) for word in (said["parameters"].split()[1],
                                                               said["parameters"].split()[3]))
    assert trained + frozen == int(said["parameters"].split(":")[0].replace(",", ""))
    held = float(said["memory"].split("parameters and optimizer ")[1].split()[0])  # fp32 with two moments; frozen fp32
    assert held == pytest.approx((12 * trained + 4 * frozen) / 2**20, abs=0.01)
    assert said["optimizer"] == "AdamW, learning rate a cosine, 0.01 at step 1, 0.00854 at step 2, 0.00146 at step 4"
    assert not (tmp_path / "run").exists()


def test_averages_are_counted_and_named(stage, tmp_path):
    said = lines(dry_run(change(stage, "optimizer", ema=0.9, schedule="constant"), tmp_path))
    trained, frozen = (int(said["parameters"].split()[place].replace(",", "")) for place in (1, 3))
    held = float(said["memory"].split("parameters, their averages and optimizer ")[1].split()[0])
    assert held == pytest.approx((16 * trained + 4 * frozen) / 2**20, abs=0.01)
    assert said["optimizer"].strip() == ("AdamW, learning rate constant after the warm-up, 0.01 at step 1, 0.01 at "
                                         "step 2, 0.01 at step 4; averages with ema 0.9 are measured and read")


def test_a_start_logs_the_same_and_a_dry_run_of_its_directory_resumes(stage, tmp_path, caplog):
    stage = dataclasses.replace(stage, steps=2)
    first = dry_run(stage, tmp_path)
    with caplog.at_level(logging.INFO, "vocojax"):
        train(stage, tmp_path)
    assert f"\n{first}" in caplog.messages
    finished = dry_run(stage, tmp_path)
    assert "resumes after step 2, 0 of 2 steps to go" in finished
    assert lines(finished)["optimizer"].strip() == "AdamW, learning rate a cosine, 0.005 at step 2"
    with pytest.raises(CheckpointError, match=r"holds a run with another config \(differing: seed\)"):
        dry_run(dataclasses.replace(stage, seed=3), tmp_path)


def change(stage, part, **values):
    return dataclasses.replace(stage, **{part: dataclasses.replace(getattr(stage, part), **values)})


@pytest.mark.parametrize("start", [train, dry_run])
def test_paths_are_looked_at_before_anything_is_compiled(stage, tmp_path, llava_data, no_compilation, start):
    root, records = tmp_path / "empty", llava_data / "records.json"
    root.mkdir()
    for wrong, error, message in (
        (change(stage, "data", image_root=str(root)), ConfigError,
         rf"data.image_root must be the directory of the files that {records} names: all 11 looked for were missing "
         rf"below {root}; the first is {root}/0.png"),
        (change(stage, "data", path="none.json"), ConfigError, "data.path must be readable as 'llava'"),
        (change(stage, "data", tokenizer="none"), ConfigError, "data.tokenizer must be usable"),
        (dataclasses.replace(stage, init_from=str(tmp_path / "none")), ConvertError, "none"),
        (dataclasses.replace(stage, distill=DistillConfig(str(tmp_path / "gone"))), ConvertError, "gone"),
        (dataclasses.replace(stage, init_new=("nothing/.*",)), ConfigError, "init_new has the regex 'nothing/"),
        (dataclasses.replace(stage, validation=ValidationConfig(2, path="held_out.json", image_root=".")), ConfigError,
         "validation: data.path must be readable"),
    ):
        with pytest.raises(error, match=message):
            start(wrong, tmp_path / "run")


def print_dry_run(stage, workdir):
    print(f"<{dry_run(stage, workdir)}>")


@pytest.mark.slow
def test_a_dry_run_of_two_processes_ends_and_says_it_once(stage, tmp_path):
    stage = dataclasses.replace(stage, mesh=MeshConfig(data=-1))
    children = runs.start_work(functools.partial(print_dry_run, stage, str(tmp_path / "run")), tmp_path / "run", 2)
    assert runs.finish(children, limit=120) == [0, 0], runs.logs(tmp_path / "run")
    first, second = (path.read_text() for path in sorted(tmp_path.glob("run.*.log")))
    assert "2 x cpu of 2 processes: slice 1 x data 2 x fsdp 1 x tensor 1" in first and "<>" in second
    assert "per device" not in second and not (tmp_path / "run").exists()
