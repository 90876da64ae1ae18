"""Cached answers against a single pass: a tiny random model here, the quickstart's by launch/agreement.py."""

import numpy as np

from vocojax.data.conversation import template
from vocojax.evaluation.agreement import Agreement, agreement
from vocojax.inference.assistant import Assistant
from vocojax.inference.decoding.decode import Generation


def test_random_questions_about_random_images(tiny_model, words):
    images = list(np.random.default_rng(1).integers(0, 255, (7, 32, 32, 3), dtype=np.uint8))
    questions = ["what color is the shape?", "is the shape red?", "a picture of", "what?"]
    found = agreement(Assistant(tiny_model, words, template("short")), images, questions, 240, batch_size=64)
    assert set(found) == {"fresh", "loaded", "joined", "cut", "rotated"}
    for way in found.values():
        assert way.pairs == way.identical == 240
        assert way.max_abs_logit_diff < 1e-4


def test_a_difference_is_counted():
    a = Generation(np.array([[1, 2], [3, 4], [5, 6]]), np.array([[0.0, -np.inf], [1, -np.inf], [2, -np.inf]]))
    b = Generation(np.array([[1, 2], [3, 9], [9, 9]]), np.array([[0.5, -np.inf], [1, -np.inf], [9, -np.inf]]))
    found = Agreement()
    found.add(a, b, 2)
    assert (found.pairs, found.identical, found.max_abs_logit_diff) == (2, 1, 0.5)


def test_a_nan_is_no_agreement():
    good, bad = (Generation(np.array([[1]]), np.array([[x, -np.inf]])) for x in (0.0, np.nan))
    for a, b in ((good, bad), (bad, good)):
        found = Agreement()
        found.add(a, b, 1)
        found.add(good, good, 1)
        assert np.isnan(found.max_abs_logit_diff)
