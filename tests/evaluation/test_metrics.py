"""Metrics on literal cases. Expected values are worked out from the official definitions, named in each test."""

import pytest

from vocojax.evaluation.metrics import boxes, choices, exact, ocr, yes_no
from vocojax.evaluation.metrics.point_qa import point_qa_answer
from vocojax.evaluation.metrics.vqa import (
    textvqa_accuracy,
    textvqa_answer,
    vizwiz_accuracy,
    vizwiz_answer,
    vqa_accuracy,
    vqa_accuracy_lmms_eval,
)


@pytest.mark.parametrize(("answer", "annotators", "expected"), [
    # Three others agree: full marks; each of the three sees two others: (3 * 2/3 + 7 * 1) / 10.
    ("dog", ["dog"] * 3 + ["cat"] * 7, 0.9),
    ("dog", ["dog"] * 4 + ["cat"] * 6, 1.0),
    ("dog", ["dog"] + ["cat"] * 9, 0.3),  # the one annotator sees none, nine see one: 9 * (1/3) / 10
    ("A dog", ["dog"] * 4 + ["the cat"] * 6, 1.0),  # articles go
    ("two", ["2"] * 4 + ["3"] * 6, 1.0),  # number words are digits
    ("dont", ["don't"] * 4 + ["do"] * 6, 1.0),  # contractions are restored
    ("Dog", ["dog"] * 10, 0.0),  # ten identical annotators: nothing is cleaned, case included
    ("dog", ["dog"] * 10, 1.0),
    ("dog\n", ["dog"] * 10, 1.0),  # but newlines and ends are
    ("a/b", ["a b"] * 4 + ["c"] * 6, 1.0),  # "/" touches no space: "a b", whose article goes: "b" on both sides
    ("10,000", ["10000"] * 4 + ["c"] * 6, 1.0),  # a comma between digits: punctuation is deleted
    ("3.5.", ["3.5"] * 4 + ["c"] * 6, 1.0),  # a period before a digit stays
    ("", ["dog"] * 4 + ["cat"] * 6, 0.0),
    ("", ["the"] * 4 + ["cat"] * 6, 1.0),  # an article alone becomes nothing, and so equals nothing
])
def test_vqav2_accuracy(answer, annotators, expected):
    assert vqa_accuracy(answer, annotators) == pytest.approx(expected, abs=1e-12)


def test_vqav2_annotators_that_are_equal_in_all_fields_are_left_out_together():
    same = {"answer": "dog", "answer_confidence": "yes", "answer_id": 1}
    others = [{"answer": "cat", "answer_confidence": "yes", "answer_id": i} for i in range(2, 8)]
    # Each of four equal records sees no other "dog", the six others see four.
    assert vqa_accuracy("dog", [same] * 4 + others) == pytest.approx(0.6)


def test_lmms_eval_cleans_vqav2_even_where_annotators_agree():
    assert vqa_accuracy_lmms_eval("Dog", ["dog"] * 10) == 1.0 and vqa_accuracy("Dog", ["dog"] * 10) == 0.0


@pytest.mark.parametrize(("text", "clean"), [
    ("The dog's, really?", "dog 's really"), ("White, black", "white black"), ("A\nB\tC", "b c"), ("dont", "don't"),
    ("nine-ten", "9 10"), ("u.s.a.", "usa"), ("1,000", "1000"), ("２", "２"), ("", "")])
def test_textvqa_cleaning(text, clean):
    assert textvqa_answer(text) == clean


def test_textvqa_cleans_ten_identical_annotators_too():
    assert textvqa_accuracy("Dog", ["dog"] * 10) == 1.0


def test_vizwiz_cleans_the_prediction_only():
    assert vizwiz_answer("dont") == "don’t" and vizwiz_answer("arent") == "aren't"
    assert vizwiz_accuracy("The dog.", ["dog"] * 10) == 1.0
    assert vizwiz_accuracy("the dog", ["the dog"] * 10) == 0.0  # cleaned to "dog", which no annotator wrote


def test_gqa():
    assert [exact.gqa_answer(text) for text in ("Yes.", " yes", "a.b..")] == ["yes", " yes", "a.b"]
    # Group g: gold red 3, blue 1; predicted red 1, blue 1: (1-3)²/3 + 0 = 4/3, of one group, over 100.
    golds, said = ["red", "red", "red", "blue", "x"], ["red", "green", "pink", "blue", "x"]
    assert exact.gqa_distribution(golds, said, ["g"] * 4 + [None]) == pytest.approx(4 / 3 / 100)
    assert exact.gqa_distribution(["x"], ["x"], [None]) is None


@pytest.mark.parametrize(("text", "official", "lmms"), [
    ("Yes", "yes", "yes"), ("No", "no", "no"), ("yes.", "yes", "other"), ("NO", "yes", "no"), ("", "yes", "other"),
    ("It does not.", "no", "other"), ("Yes. No.", "yes", "other"),  # the second sentence does not count
    ("No, it is", "no", "other"), ("no\nyes", "yes", "other"),  # a newline does not separate words
    ("There isn't", "yes", "other"), ("Nothing", "yes", "other")])
def test_pope_answers(text, official, lmms):
    assert yes_no.pope_answer(text) == official and yes_no.pope_answer_lmms_eval(text) == lmms


def test_pope_scores():
    # hits 2, false alarms 1, misses 1, correct rejections 1
    scores = yes_no.detection_scores(["yes", "yes", "yes", "no", "no"], ["yes", "yes", "no", "yes", "no"])
    assert scores == pytest.approx({"f1": 2 / 3, "accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3,
                                    "yes_ratio": 0.6})
    assert yes_no.detection_scores(["no", "no"], ["no", "no"])["f1"] == 0.0  # officially 0 / 0


def test_pope_by_the_two_conventions():
    """Four answers Yes, No, yes., Yes to labels yes, no, yes, no."""
    texts, golds = ["Yes", "No", "yes.", "Yes"], ["yes", "no", "yes", "no"]
    assert yes_no.detection_scores([yes_no.pope_answer(t) for t in texts], golds)["accuracy"] == 0.75
    said = [yes_no.pope_answer_lmms_eval(t) for t in texts]
    assert yes_no.detection_scores_lmms_eval(said, golds)["accuracy"] == 0.5


@pytest.mark.parametrize(("text", "official", "lmms"), [
    ("Yes", "yes", "yes"), ("no way", "no", "no"), ("  yes", "other", "yes"), (" yes", "yes", "yes"),
    ("y", "other", "yes"), ("Not sure", "no", "no"), ("I know", "other", "other"), ("", "other", "other"),
    ("y.e.s", "other", "yes")])
def test_mme_answers(text, official, lmms):
    assert yes_no.mme_answer(text) == official and yes_no.mme_answer_lmms_eval(text) == lmms


def test_mme_points():
    # 3 of 4 right, 1 of 2 images with both: 75 + 50
    assert yes_no.mme_score([[True, True], [True, False]]) == 125.0


OPTIONS = {"A": "cat", "B": "a black cat", "C": "dog", "D": "12"}


@pytest.mark.parametrize(("text", "letter"), [
    ("B", "B"), ("(C)", "C"), ("C. dog", "C"), ("A or B", None), ("Z", "Z"),
    ("A dog is there", "A"),  # an article counts as the option
    ("A dog is there for sure", "C"),  # unless more than three words follow: the option's text counts
    ("The correct answer is **d**, I think so, yes", "D"),  # said in words, in any case
    ("the dog", "C"), ("a black cat", None),  # contains "cat" too
    ("Cannot determine the answer", "Z"), ("I can't process this file. B", "Z"),
    ("it is a very long answer about a dog and nothing else at all", None),  # longer than twice all options
    ("", None)])
def test_mmbench_letters(text, letter):
    assert choices.mmbench_letter(text, OPTIONS) == letter


@pytest.mark.parametrize(("text", "official", "lmms"), [
    ("A", "A", "A"), ("E", "E", "E"), ("A. cat", "A", "A"), ("A.", None, "A"), ("A. ", "A", "A"), ("a", None, "A"),
    ("The answer is B.", "B", None), ("The answer is B", None, None), ("The answer is B!", "B", None),
    ("The answer is A. The answer is B.", None, None), ("", None, None)])
def test_science_qa_letters(text, official, lmms):
    assert choices.science_qa_letter(text) == official and choices.science_qa_letter_lmms_eval(text) == lmms


@pytest.mark.parametrize(("text", "letter"), [
    ("B", "B"), ("The answer is C.", "C"), ("Best answer: C", "B"), ("(D) car", "D"), ("none", None)])
def test_video_mme_letters(text, letter):
    assert choices.video_mme_letter(text) == letter


@pytest.mark.parametrize(("text", "letter"), [
    ("B", "B"), ("(B) dog", "B"), ("B. dog", "B"), ("The answer is (C)", "C"), ("Dog.", "B"), ("A dog", "A"),
    ("F", None), ("birds", None), ("", None)])
def test_option_letters(text, letter):
    assert choices.option_letter(text, ["cat", "dog", "bird"]) == letter


@pytest.mark.parametrize(("text", "golds", "dataset", "official", "lmms"), [
    ("The word is STOP", "stop", "x", True, True), ("st\nop", "st op", "x", True, True), ("st op", "stop", "x", False,
                                                                                           False),
    ("x ^ 2", ["X^2", "x^2"], "HME100k", True, True), ("X^2", "x^2", "HME100k", False, False),
    ("１２", "12", "x", False, True),  # full-width digits
    ("anything", "", "x", True, True), ("", "stop", "x", False, False)])
def test_ocrbench(text, golds, dataset, official, lmms):
    assert ocr.contains_gold(text, golds, dataset) == official
    assert ocr.contains_gold_lmms_eval(text, golds, dataset) == lmms


@pytest.mark.parametrize(("text", "shikra", "lmms"), [
    ("Answer: [0.1,0.2,0.3,0.4] .", (0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
    ("[0.1, 0.2, 0.3, 0.4]", None, (0.1, 0.2, 0.3, 0.4)),  # spaces
    ("[0,0,1,1]", (0, 0, 1, 1), (0, 0, 1, 1)), ("[1.,0.,1.,1.]", (1, 0, 1, 1), None),
    ("[12.5,0.0,1.0,1.0]", None, (12.5, 0, 1, 1)),  # two digits before the point
    ("[-0.1,0.0,1.0,1.0]", None, (-0.1, 0, 1, 1)),
    ("[0.1,0.2]", None, None),  # a point
    ("[0.1,0.2,0.3,0.4;0.1,0.2,0.3,0.4]", None, None),  # two boxes
    ("[0.1,0.2,0.3,0.4][0.5,0.6,0.7,0.8]", None, (0.1, 0.2, 0.3, 0.4)),
    ("[０.１,0.2,0.3,0.4]", (0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),  # a full-width digit is a digit
    ("", None, None)])
def test_box_parsers(text, shikra, lmms):
    assert boxes.shikra_box(text) == shikra and boxes.first_box_lmms_eval(text) == lmms


def test_iou():
    half = ((0.0, 0.0, 1.0, 0.5), (0.0, 0.0, 1.0, 1.0))
    assert float(boxes.shikra_ious(*[[box] for box in half])[0]) == 0.5 == boxes.iou(*half)
    # Swapped x: the box has the negative area of the gold box, so the union is 0 and officially the IoU is NaN.
    assert boxes.shikra_ious([(0.6, 0.2, 0.4, 0.4)], [(0.4, 0.2, 0.6, 0.4)]).tolist() == [0.0]
    assert boxes.shikra_ious([boxes.NO_BOX], [(0.4, 0.2, 0.6, 0.4)]).tolist() == [0.0]
    assert boxes.grit_iou((0, 0, 10, 5), (0, 0, 10, 10)) < 0.5  # 50 / (100 + 1e-6)
    assert boxes.grit_iou((10, 0, 0, 5), (0, 0, 10, 10)) == 0.0


def test_point_qa():
    assert point_qa_answer("The answer is red .") == "red" and point_qa_answer("red") is None
    assert point_qa_answer("The answer is 3.5 .") == "3"  # cut at the first period
    assert point_qa_answer("The answer is a. The answer is b.") is None
