"""Reading few VoCo tokens, and more where the answer is unsure: the rule, and what its calibration guarantees."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocojax.config import levels_of
from vocojax.errors import InputError
from vocojax.inference.assistant import Assistant
from vocojax.inference.calibration import (
    NEVER,
    Trace,
    calibration_of,
    curve,
    reached,
    threshold_of,
    trace_questions,
)
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.refining import (
    FILE,
    Calibration,
    entropies,
    read_calibration,
    refine,
    write_calibration,
)
from vocojax.inference.requests import Request

LEVELS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0]), st.booleans()), min_size=1, max_size=3)
TRACES = st.lists(LEVELS.map(lambda pairs: Trace(*map(tuple, zip(*pairs, strict=True)))), min_size=4, max_size=30)


def test_levels_are_powers_of_two_and_all():
    assert [levels_of(n) for n in (1, 2, 3, 8)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 8)]


def test_entropies():
    logits = np.array([[0.0, 0.0, -1e9, -1e9], [7.0, 7.0, 7.0, 7.0], [1000.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(entropies(logits), [math.log(2), math.log(4), 0.0], atol=1e-9)


def test_only_unsure_answers_are_asked_again():
    sure, unsure = [9.0, 0.0], [0.0, 0.0]
    asked = []

    def ask(places, vocos):
        asked.append((list(places), vocos))
        return [f"{place} from {vocos}" for place in places], np.array(
            [sure if (place, vocos) in {(0, 1), (2, 2)} else unsure for place in places])

    found = refine(ask, 3, Calibration((1, 2, 4), 0.5, 0.9, 10, ""))
    assert asked == [([0, 1, 2], 1), ([1, 2], 2), ([1], 4)]
    assert found == (["0 from 1", "1 from 4", "2 from 2"], [1, 4, 2])


@pytest.mark.parametrize(("entropy", "agrees", "score"), [
    ((0.3, 0.1), (True, True), NEVER),
    ((0.3, 0.1), (False, True), 0.3),  # below 0.3 the second level's answer stands
    ((0.3, 0.1), (True, False), 0.1),
    ((0.1, 0.3), (True, False), NEVER),  # the second level's answer never stands: the first is surer
    ((0.3, 0.3), (True, False), NEVER),
])
def test_the_score_is_the_lowest_threshold_that_goes_wrong(entropy, agrees, score):
    trace = Trace(entropy, agrees)
    assert trace.score == score
    for threshold in (0.05, 0.1, 0.2, 0.3, 0.4):  # an answer stands if its entropy is below the threshold
        if threshold <= score:
            assert reached([trace], (1, 2, 4), threshold).agreement == 1


@given(TRACES, st.sampled_from([0.5, 0.75, 0.9]))
def test_a_question_left_out_disagrees_no_oftener_than_asked_for(traces, agreement):
    """Split conformal's guarantee, exact: whichever of the questions is the new one, all are alike."""
    rank = math.floor((1 - agreement) * len(traces) + 1e-9)
    if rank < 1:
        with pytest.raises(InputError, match="held-out questions, got"):
            threshold_of(traces[1:], agreement)
        return
    wrong = 0
    for place, left_out in enumerate(traces):
        threshold = threshold_of(traces[:place] + traces[place + 1 :], agreement)
        wrong += reached([left_out], (1, 2, 4, 8), threshold).agreement < 1
    assert wrong <= rank <= (1 - agreement) * len(traces) + 1e-9


def test_entropies_of_tokens_that_can_not_be_drawn():
    """Two even choices, one certain choice and three even ones; a token with the logit -inf adds nothing."""
    found = entropies(np.array([[0.0, 0.0, -np.inf], [500.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    np.testing.assert_allclose(found, [np.log(2), 0.0, np.log(3)], atol=1e-12)


def test_too_few_questions_are_refused():
    traces = [Trace((0.1,), (True,))] * 98
    with pytest.raises(InputError, match=r"an agreement of 0.99 needs at least 99 held-out questions, got 98"):
        threshold_of(traces, 0.99)
    assert threshold_of([*traces, traces[0]], 0.99) == NEVER
    with pytest.raises(InputError, match="must be between 0 and 1"):
        threshold_of(traces, 1.0)


def test_a_model_reads_what_its_calibration_says(assistant, cache, images, tmp_path):
    questions = ["what color is the shape?", "is the shape red?", "what is it?", "red?"]
    short = SamplingConfig(max_new_tokens=3)
    requests = [Request(question, (image,), short) for image in images for question in questions]
    traces = trace_questions(assistant, requests, progress=None)
    levels = levels_of(assistant.processor.unit.vocos)
    assert len(traces) == 20 and levels[-1] == cache.tokens_per_unit > 1
    found = calibration_of(assistant, traces, 0.8)
    assert found.questions == 20 and reached(traces, levels, found.threshold).agreement >= 0.8
    assert [point.mean_tokens for _, point in curve(traces, levels)] == sorted(
        (point.mean_tokens for _, point in curve(traces, levels)), reverse=True)

    own = Assistant(assistant.model, assistant.tokenizer, assistant.template)
    with pytest.raises(InputError, match="vocos='auto' needs a calibration beside the checkpoint"):
        own.read(cache, questions, vocos="auto")
    write_calibration(tmp_path, found)
    own.calibration = read_calibration(tmp_path)
    assert own.calibration == found
    units = [[place // 4] for place in range(20)]
    asked = questions * 5
    refined = own.refine(cache, asked, units, short)
    assert refined.texts == own.read(cache, asked, units, short, vocos="auto")
    assert refined.tokens == [levels[trace.level(found.threshold)] for trace in traces]
    for level in levels:
        answers = own.read(cache, asked, units, short, vocos=level)
        assert all(text == answers[place] for place, (text, read) in enumerate(zip(*refined, strict=True))
                   if read == level)

    with pytest.raises(InputError, match="and the cache holds 1: give the whole cache"):
        own.read(cache.truncate(1), questions, vocos="auto")
    with pytest.raises(InputError, match="is calibrated for greedy answers"):
        own.read(cache, questions, sampling=SamplingConfig(temperature=1.0), vocos="auto")
    own.calibration = dataclasses.replace(found, model="0" * 32)
    with pytest.raises(InputError, match="is of model 000000000000, and this is"):
        own.read(cache, questions, vocos="auto")


def test_a_damaged_calibration_is_named(tmp_path):
    assert read_calibration(tmp_path) is None and read_calibration(tmp_path / "nowhere") is None
    (tmp_path / FILE).write_text(json.dumps({"levels": 3}))
    with pytest.raises(InputError, match=r"refining.json: is damaged \(.*\); remove it, or run vocojax cal"):
        read_calibration(tmp_path)
