"""The quickstart's code path end to end, with a handful of steps."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from configs import alignment, quickstart, voco
from vocojax.config import ConfigError
from vocojax.experiments import jobs
from vocojax.experiments.quickstart import Quickstart
from vocojax.inference.assistant import Assistant
from vocojax.training.config import stage_config

pytest.importorskip("easy_vqa")
ROOT = Path(__file__).parent.parent


class Tiny(dict):
    """The same small number of steps for every stage."""

    def __contains__(self, stage):
        return True

    def get(self, stage, default=None):
        return 2


class AskedOnce(Quickstart):
    """A quickstart that remembers the answers of its models when it runs again."""

    answers: ClassVar = {}

    def _answer(self, requests, arm, seed, way="single pass"):
        key = (self.workdir, arm, seed, way)
        if key not in self.answers:
            self.answers[key] = super()._answer(requests, arm, seed, way)
        return self.answers[key]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quickstart")
    result = AskedOnce(quickstart.get_config, workdir, steps=Tiny(), test_images=12).run()
    return workdir, result


def test_result_is_what_is_promised(finished):
    workdir, result = finished
    assert json.loads((workdir / "retention.json").read_text()) == result
    assert list(result["rows"]) == ["Upper Bound", "VoCo-1", "Lower Bound"]
    for row in result["rows"].values():
        assert 0 <= row["accuracy"] <= 1
        assert set(row["accuracy_by_question_type"]) == {"colour", "shape", "yes/no"}
    assert result["seeds"] == [0] and result["vision_tokens"] == 16
    two_stage = result["two_stage"]
    assert two_stage["questions"] == two_stage["identical_answers"] > 100
    assert 0 <= two_stage["max_abs_logit_diff"] < 1e-4
    assert {"vision", "alignment", "upper_bound", "voco_1", "evaluation"} <= set(result["seconds"])


def test_report_is_one_self_contained_page(finished):
    page = (finished[0] / "report.html").read_text()
    assert not re.search(r"(src|href)='?(?!data:)\w", page) and "<script" not in page
    assert page.count("data:image/png;base64,") == 14  # mask, losses, twelve test images
    for text in ("Upper Bound", "VoCo-1", "Lower Bound", "gold", "retention"):
        assert text in page


def test_a_finished_quickstart_trains_nothing_again(finished, monkeypatch):
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: 1)  # two processes that train nothing would be started
    workdir, result = finished
    written = workdir.glob("seed_0/*/checkpoints/*/_CHECKPOINT_METADATA")
    checkpoints = {path: path.stat().st_mtime_ns for path in written}
    assert len(checkpoints) == 4
    again = AskedOnce(quickstart.get_config, workdir, steps=Tiny(), test_images=12).run()
    assert again["rows"] == result["rows"]
    assert all(path.stat().st_mtime_ns == before for path, before in checkpoints.items())


def test_its_runs_answer_questions(finished):
    assistant = Assistant.from_run(finished[0] / "seed_0" / "voco_1")
    from vocojax.data.sources.easy_vqa import EasyVqaSource

    images = EasyVqaSource("validation").images[:2]
    cache = assistant.compress(images)
    assert cache.tokens_per_unit == 1 and cache.num_units == 2
    assert all(isinstance(answer, str) for answer in assistant.read(cache, ["what color is the shape?"] * 3))


@pytest.mark.slow
def test_every_row_of_the_full_table(tmp_path):
    result = Quickstart(quickstart.get_config, tmp_path, full=True, steps=Tiny(), test_images=3).run()
    assert list(result["rows"]) == [
        "Upper Bound", "VoCo-1", "Lower Bound", "VoCo-2 (own rows)", "VoCo-8 (own rows)", "Avg. Pool + Linear",
        "Q-Former (1 query)", "LLaMA-VID (2 tokens)", "Downsampled image (1 token)", "Random (1 token)"]


@pytest.mark.parametrize("stage", [
    "alignment", "upper_bound", "voco_1", "voco_8", "voco_8+own", "avg_pool", "qformer", "llama_vid", "downsample",
    "random"])
def test_every_stage_s_config_is_valid(stage):
    values = quickstart.get_config(stage)
    values.data.tokenizer = "tokenizer"
    assert stage_config(values).name == stage


def test_the_published_stages_need_their_data_and_nothing_else():
    for config in (alignment, voco):
        values = config.get_config()
        with pytest.raises(ConfigError, match=r"data\.tokenizer must name a tokenizer directory"):
            stage_config(values)
        values.data.update(tokenizer="t", path="x.json", image_root="images")
        assert stage_config(values).model.unit_tokens == 576


def test_the_command_line_names_what_is_wrong(tmp_path):
    """More mistakes are in tests/launch/test_mistakes.py."""
    command = [sys.executable, "launch/train.py", "--config=configs/quickstart.py:voco_1", f"--workdir={tmp_path}/run",
               "--config.data.tokenizer=x", "--config.model.voco.num_vocos=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: configs/quickstart.py:voco_1: model.voco.num_vocos must be >= 1")


def test_every_key_the_training_page_names_can_be_set():
    """The flags of docs/train.md, parsed as launch/train.py parses them."""
    flags = re.findall(r"--config\.([a-z_.]+)=('[^']+'|[^\s`\\]+)", (ROOT / "docs/train.md").read_text())
    assert {"mesh.fsdp", "accumulate", "distill.teacher", "model.voco.num_vocos", "init_from"} <= {k for k, _ in flags}
    values = voco.get_config()
    for key, value in flags:
        node = values
        *parents, last = key.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = ast.literal_eval(value.strip("'")) if value.startswith("'[") else type(node[last])(value)
    stage_config(values)
