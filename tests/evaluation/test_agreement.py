"""Cached answers against a single pass: a tiny random model here, the quickstart's by launch/agreement.py."""

import numpy as np

from vocojax.data.conversation import template
from vocojax.evaluation.agreement import Agreement, agreement
from vocojax.inference.assistant import Assistant
from vocojax.inference.requests import Answer


def test_random_questions_about_random_images(tiny_model, words):
    images = list(np.random.default_rng(1).integers(0, 255, (7, 32, 32, 3), dtype=np.uint8))
    questions = ["what color is the shape?", "is the shape red?", "a picture of", "what?"]
    found = agreement(Assistant(tiny_model, words, template("short")), images, questions, 240, batch_size=64)
    assert set(found) == {"fresh", "loaded", "joined", "cut", "rotated"}
    for way in found.values():
        assert way.pairs == way.identical == 240
        assert way.max_abs_logit_diff < 1e-4


def answered(ids, logit):
    return Answer("", "length", token_ids=tuple(ids), first_logits_V=np.array([logit, -np.inf]))


def test_a_difference_is_counted():
    found = Agreement()
    found.add(answered([1, 2], 0.0), answered([1, 2], 0.5))
    found.add(answered([3, 4], 1), answered([3, 9], 1))
    assert (found.pairs, found.identical, found.max_abs_logit_diff) == (2, 1, 0.5)


def test_a_nan_is_no_agreement():
    good, bad = (answered([1], logit) for logit in (0.0, np.nan))
    for a, b in ((good, bad), (bad, good)):
        found = Agreement()
        found.add(a, b)
        found.add(good, good)
        assert np.isnan(found.max_abs_logit_diff)
