"""Files of version 0.1 are still read: runs (also with LoRA, and an upper bound), a conversion, a store of caches.

The archive was made by that version, with the losses, logits and answers that it got; none of it is ever made again.
"""

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vocojax.data.conversation import Turn
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.store import Store
from vocojax.runs.directory import run_config
from vocojax.runs.earlier import upgraded
from vocojax.training.config import StageConfig, stage_config
from vocojax.training.stage import train

ARCHIVE = Path(__file__).parent / "fixtures" / "version_0_1.zip"
QUESTION = "what color is the shape?"


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A directory with what version 0.1 wrote, in which the test runs: the runs name their data by relative paths."""
    zipfile.ZipFile(ARCHIVE).extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return json.loads((tmp_path / "expected.json").read_text())


@pytest.mark.parametrize("name", ["run", "lora", "upper", "converted"])
def test_weights_of_an_earlier_version_answer_as_they_did(earlier, name):
    assistant = Assistant.from_run(name)
    images = [assistant.load_images([path]) for path in sorted(Path("data/images").iterdir())]
    generation = assistant.generate_whole(images, [(Turn("user", QUESTION),)] * len(images))
    expected = np.array(earlier[name]["logits"], dtype=float)  # None, for the <voco> token's -inf, becomes NaN
    logits = np.asarray(generation.logits_BV)
    assert np.isfinite(expected).sum() > 20
    np.testing.assert_allclose(logits[np.isfinite(expected)], expected[np.isfinite(expected)], atol=2e-5)
    assert np.asarray(generation.ids_BT)[:, :4].tolist() == earlier[name]["ids"]


def test_a_run_of_an_earlier_version_is_resumed(earlier):
    """It stopped after two of four steps; the other two have the losses that they had then."""
    config: StageConfig = stage_config(run_config("run"))
    train(dataclasses.replace(config, steps=4), "run")
    losses = [json.loads(line)["loss"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(losses, earlier["losses"], rtol=1e-5)


def test_a_store_of_an_earlier_version_is_read(earlier):
    assistant = Assistant.from_run("run")
    assert assistant.fingerprint.digest == earlier["fingerprint"]
    caches = [Store("store").get(digest, assistant.fingerprint, 2) for digest in earlier["images"]]
    fresh = assistant.compress(sorted(Path("data/images").iterdir()))
    for unit, cache in enumerate(caches):
        np.testing.assert_allclose(cache.k_LUNGD[:, 0], fresh.k_LUNGD[:, unit], atol=1e-5)
        assert assistant.read(cache, [QUESTION]) == assistant.read(fresh, [QUESTION], units=[[unit]])
    small = Store("store", "int8").get(earlier["images"][0], assistant.fingerprint, 2)
    assert np.abs(np.asarray(small.k_LUNGD) - np.asarray(caches[0].k_LUNGD)).max() < 0.1


def test_what_trained_in_an_earlier_version_trains(earlier):
    """Its two lists of regexes are today's one; a config of today is left as it is."""
    saved = json.loads(Path("lora/config.json").read_text())
    rates = upgraded(saved)["learning_rates"]
    assert rates == [*([regex, 1.0] for regex in saved["train"]), *([regex, "freeze"] for regex in saved["freeze"])]
    assert upgraded(upgraded(saved)) == upgraded(saved) and upgraded({"seed": 1}) == {"seed": 1}
