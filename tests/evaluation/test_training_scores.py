"""Benchmark scores and answers to fixed prompts while a run trains."""

import dataclasses
import shutil
import sys
import types

import numpy as np
import pytest

from tests.helpers import run_processes as runs
from tests.helpers.metrics import lines, of_steps
from vocojax.config import ConfigError, config_to_dict
from vocojax.evaluation import training_scores
from vocojax.evaluation.benchmarks.base import Item
from vocojax.evaluation.benchmarks.registry import open_benchmark
from vocojax.evaluation.training_scores import open_scorer, subset
from vocojax.inference.assistant import Assistant
from vocojax.inference.many import answer_many
from vocojax.parallel.mesh import MeshConfig
from vocojax.parallel.preemption import Preempted, StopRequest
from vocojax.training.config import CheckpointConfig, ValidationConfig, stage_config
from vocojax.training.run_log import RunLog
from vocojax.training.scoring import Sample
from vocojax.training.stage import train

NAME = "pope_random"


@pytest.fixture
def asking(data_root, llava_data):
    image = str(llava_data / "images" / "0.png")
    return ValidationConfig(ask_every=2, benchmarks=(NAME,), data_root=str(data_root),
                            prompts=((image, "what color is the shape?"), ("", "what color is red?")))


def scores(workdir):
    return {line["step"]: line[f"validation/{NAME}"] for line in lines(workdir) if f"validation/{NAME}" in line}


def test_scores_are_those_of_evaluate_and_change_no_step(stage, asking, data_root, tmp_path, monkeypatch):
    monkeypatch.setattr(training_scores, "BATCH", 3)
    train(stage, tmp_path / "without")
    asked = dataclasses.replace(stage, validation=asking)
    train(asked, tmp_path / "with", open_scorer=open_scorer)
    found = scores(tmp_path / "with")
    assert sorted(found) == [2, 4]
    benchmark, assistant = open_benchmark(NAME, data_root), Assistant.from_run(tmp_path / "with")
    answers = [answer.text for answer in answer_many(assistant, benchmark.requests(), progress=None)]
    assert found[4] == benchmark.score(answers).value
    assert of_steps(tmp_path / "with") == of_steps(tmp_path / "without")
    events = b"".join(path.read_bytes() for path in (tmp_path / "with").glob("events*"))
    for tag in (f"validation/{NAME}/0", f"validation/{NAME}/1", "validation/prompt/0", "validation/prompt/1"):
        assert events.count(tag.encode() + b"/text_summary") == 2  # after steps 2 and 4
    assert events.count(b"\x89PNG") == 2 * 4  # of the benchmark's three images, and of one of the prompts
    assert b"**what color is red?**" in events and b"gold: yes" in events

    # A stop ends an asking; what resumes has the same scores.
    stops = []
    monkeypatch.setattr(StopRequest, "reached", lambda self: bool(stops))

    def open_and_stop(config, tokenizer):
        scorer = open_scorer(config, tokenizer)
        return lambda model, mesh, should_continue: (stops.append(1), scorer(model, mesh, should_continue))[1]

    with pytest.raises(Preempted, match="after step 2 of 4; checkpoint saved"):
        train(asked, tmp_path / "stopped", open_scorer=open_and_stop)
    assert scores(tmp_path / "stopped") == {}
    stops.clear()
    train(asked, tmp_path / "stopped", open_scorer=open_scorer)
    assert scores(tmp_path / "stopped") == {4: found[4]}


def test_checkpoints_are_kept_by_a_score(stage, asking, tmp_path):
    values = iter([30.0, 50.0, 40.0, 20.0])
    scorer = lambda model, mesh, should_continue: training_scores.Scores({f"validation/{NAME}": next(values)})
    best = CheckpointConfig(every=2, keep=1, keep_best=1, best_metric=f"validation/{NAME}", best_is="highest")
    train(dataclasses.replace(stage, steps=8, checkpoint=best, validation=asking), tmp_path,
          open_scorer=lambda config, tokenizer: scorer)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [4, 8]


def test_questions_are_evenly_spread_and_about_whole_visuals():
    items = [Item(str(place), "what?", (f"{place // 2}.png",)) for place in range(20)]
    assert [item.id for item in subset(items, 6)] == ["0", "1", "6", "7", "12", "13"]
    assert [item.id for item in subset(items, 1)] == ["0", "1"]
    assert subset(items, 99) == items


@pytest.mark.parametrize(("validation", "checkpoint", "message"), [
    ({"benchmarks": ["gqa"]}, {}, "validation.ask_every must be > 0 to ask benchmarks and prompts"),
    ({"ask_every": 2}, {},
     "validation.ask_every must be > 0 to ask benchmarks and prompts, and 0 where there are none"),
    ({"questions": 0}, {}, "validation.questions must be >= 1, got 0"),
    ({}, {"best_metric": "f1"}, "checkpoint.best_metric must be one of loss, "),
    ({"ask_every": 2, "benchmarks": ["gqa"]}, {"keep_best": 1, "best_metric": "validation/gqa"},
     "checkpoint.best_is must be 'highest' to keep the best by validation/gqa"),
    ({"ask_every": 4, "benchmarks": ["gqa"]},
     {"every": 6, "keep_best": 1, "best_metric": "validation/gqa", "best_is": "highest"},
     "checkpoint.every must be a multiple of validation.ask_every 4 > 0 to keep the best by validation/gqa"),
])
def test_config_errors_name_the_key(stage, validation, checkpoint, message):
    values = config_to_dict(stage)
    values["validation"].update(validation)
    values["checkpoint"].update(checkpoint)
    with pytest.raises(ConfigError) as error:
        stage_config(values)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("changes", "message"), [
    ({"benchmarks": ("pop",)}, "validation.benchmarks can't be asked while training: benchmark 'pop' is unknown"),
    ({"benchmarks": ("vizwiz_test",)},
     "validation.benchmarks can't be asked while training: vizwiz_test: labels are not public"),
    ({"data_root": "nowhere"},
     "validation.benchmarks can't be asked while training: nowhere/pope/coco_pope_random.json"),
    ({"prompts": (("no.png", "what?"),)}, "validation.prompts names the image no.png, which is not there"),
])
def test_what_cant_be_asked_is_named_at_the_start(stage, asking, words, changes, message):
    config = dataclasses.replace(stage, validation=dataclasses.replace(asking, **changes))
    with pytest.raises(ConfigError) as error:
        open_scorer(config, words)
    assert str(error.value).startswith(message)


def test_missing_images_are_named_at_the_start(stage, asking, words, data_root, tmp_path):
    (tmp_path / "pope").mkdir()
    shutil.copy(data_root / "pope" / "coco_pope_random.json", tmp_path / "pope")
    config = dataclasses.replace(stage, validation=dataclasses.replace(asking, data_root=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"has pope_random, of which 4 of 4 images are missing, the first is "):
        open_scorer(config, words)


def test_a_training_that_has_nobody_to_ask_says_so(stage, asking, tmp_path):
    with pytest.raises(ConfigError, match="needs who asks: use `vocojax train`, or call train"):
        train(dataclasses.replace(stage, validation=asking), tmp_path)


def test_samples_go_to_weights_and_biases(tmp_path, monkeypatch):
    logged = []
    fake = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        init=lambda **_: fake, Image=lambda pixels, caption: (pixels.shape, caption), Html=lambda text: text))
    log = RunLog(tmp_path, 0, "project", "name")
    log.write_samples(2, [Sample("validation/a/0", "what?", np.zeros((8, 8, 3), np.uint8)),
                          Sample("validation/prompt/0", "is 1 < 2?")])
    log.close()
    assert logged == [(2, {"validation/a/0": ((8, 8, 3), "what?"), "validation/prompt/0": "<pre>is 1 &lt; 2?</pre>"})]


@pytest.mark.slow
def test_processes_and_meshes_agree(stage, asking, tmp_path):
    stage = dataclasses.replace(stage, batch_size=8, steps=2, checkpoint=CheckpointConfig(every=2), validation=asking)
    runs.run(stage, tmp_path / "one")
    for name, processes, devices, mesh in (
        ("two", 2, 1, MeshConfig()), ("four", 1, 4, MeshConfig(data=2, fsdp=2)), ("eight", 2, 4, MeshConfig(fsdp=4)),
    ):
        runs.run(dataclasses.replace(stage, mesh=mesh), tmp_path / name, processes, devices)
        np.testing.assert_allclose(list(scores(tmp_path / name).values()), list(scores(tmp_path / "one").values()))
