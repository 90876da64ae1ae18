"""The experiment on mosaics: its tables by hand, and a run of a few steps from images to the report."""

import json

import numpy as np
import pytest

from vocojax.evaluation.retention import Score
from vocojax.experiments.mosaic_report import worst
from vocojax.experiments.mosaic_tables import format_tables, rows_by_seed
from vocojax.experiments.mosaic_tower import augmented, tile_of_patches

SCORES = {
    "Upper Bound": [Score(0.9, {"binding": 0.9}), Score(1.0, {"binding": 1.0})],
    "VoCo-1": [Score(0.6, {"binding": 0.5}), Score(0.6, {"binding": 0.7})],
    "Lower Bound": [Score(0.3, {"binding": 0.3}), Score(0.2, {"binding": 0.2})],
}


def test_rows_by_hand():
    rows = rows_by_seed(SCORES)
    assert rows["VoCo-1"]["accuracy"] == [0.6, 0.6]
    assert rows["VoCo-1"]["by_type"] == {"binding": [0.5, 0.7]}
    assert rows["VoCo-1"]["retention"] == pytest.approx([0.5, 0.5])
    assert rows["VoCo-1"]["of_upper"] == pytest.approx([2 / 3, 0.6])
    assert rows["Upper Bound"]["retention"] == [1.0, 1.0]
    assert rows["Lower Bound"]["retention"] == [0.0, 0.0]


def test_the_printed_table():
    result = {"rows": rows_by_seed(SCORES), "table_4": {}, "questions": 4000, "split": "test",
              "bits_per_image": 18.34, "vision_tokens": 16}
    lines = format_tables(result).splitlines()
    assert lines[0] == "4,000 questions of the test split; 18.3 bits, 16 vision tokens per image"
    assert lines[3].split() == ["Upper", "Bound", "95.0", "%", "5.0", "%", "90.0", "100.0", "95.0", "%", "100.0", "%",
                                "100.0", "%"]
    assert lines[4].split()[:8] == ["VoCo-1", "60.0", "%", "0.0", "%", "60.0", "60.0", "60.0"]


def test_worst_examples():
    answers = {"Upper Bound": ["red", "no", "2", "blue"], "VoCo-1": ["red", "yes", "2", "red"]}
    assert worst(["red", "no", "1", "blue"], answers, "Upper Bound", "VoCo-1", 5) == [1, 3]
    assert worst(["red", "no", "1", "blue"], answers, "Upper Bound", "VoCo-1", 1) == [1]


def test_tiles_of_patches():
    assert tile_of_patches(2, 4).reshape(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


def test_augmentation_stays_in_its_tile():
    """Tiles of one colour each stay as they are; a mark near the edge of a tile never enters another one."""
    colours = np.array([10, 60, 110, 160], np.uint8).reshape(2, 2)
    canvas = np.repeat(np.repeat(colours, 32, 0), 32, 1)[None, ..., None].repeat(3, -1)
    assert (augmented(canvas, 2, np.random.default_rng(0)) == canvas).all()
    canvas[0, 10:12, 36:38] = 255
    for seed in range(5):
        changed = augmented(canvas, 2, np.random.default_rng(seed))
        assert (changed[0, :, :32] == canvas[0, :, :32]).all()
        assert (changed[0, 32:] == canvas[0, 32:]).all()
        assert (changed[0, :, 32:] == 255).any()


@pytest.mark.slow
def test_a_run_of_a_few_steps(tmp_path):
    pytest.importorskip("easy_vqa")
    from configs.mosaic import get_config
    from tests.test_quickstart import Tiny
    from vocojax.experiments.mosaic import ARMS, ELASTIC, RECIPES, Mosaic
    from vocojax.inference.assistant import Assistant

    result = Mosaic(get_config, tmp_path, recipes=RECIPES, steps=Tiny(), canvases=7).run()
    assert list(result["rows"]) == [arm.name for arm in ARMS]
    assert list(result["table_4"]) == [f"{name}, {number} read" for name in ("VoCo-8", "VoCo-8 elastic")
                                       for number in (8, 4, 2, 1)]
    assert result["table_4"]["VoCo-8, 8 read"] == result["rows"]["VoCo-8"]
    assert result["questions"] == 112
    assert json.loads((tmp_path / "tables.json").read_text())["rows"] == result["rows"]
    recipes = json.loads((tmp_path / "recipes.json").read_text())["rows"]
    assert set(recipes) == {"Upper Bound", "Lower Bound", *(arm.name for arm in RECIPES)}
    refining = result["refining"]
    assert refining["questions"] == [112] and 1 <= refining["mean_tokens"][0] <= 8
    assert refining["curve"][0][0] == [8.0, 1.0], "a threshold of 0 asks for all tokens"
    page = (tmp_path / "report.html").read_text()
    assert "Retention over the number of VoCo tokens" in page and "more where the answer is unsure" in page
    assistant = Assistant.from_run(tmp_path / "seed_0" / ELASTIC)
    assert assistant.calibration.levels == (1, 2, 4, 8) and assistant.calibration.questions == 112
