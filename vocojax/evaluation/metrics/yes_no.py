"""Answers that are yes or no: POPE's and MME's readings of a text, and their scores."""

from collections.abc import Sequence
from typing import Literal

YesNo = Literal["yes", "no", "other"]


def pope_answer(text: str) -> YesNo:
    """Returns POPE's reading: no if the first sentence has a word "No", "no" or "not", else yes.

    Words are separated by spaces only, so that "no\\nIt is" holds no word "no".
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_answer_lmms_eval(text: str) -> YesNo:
    """Returns lmms-eval's reading of an answer to POPE: the whole text, in any case."""
    text = text.lower().strip()
    return text if text in ("yes", "no") else "other"  # type: ignore[return-value]


def mme_answer(text: str) -> YesNo:
    """Returns MME's reading: yes, else no, in the first four characters in lower case."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_answer_lmms_eval(text: str) -> YesNo:
    """Returns lmms-eval's reading of an answer to MME: stripped, without periods, "y" and "n" count."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or mme_answer(text)  # type: ignore[return-value]


def detection_scores(answers: Sequence[YesNo], golds: Sequence[str]) -> dict[str, float]:
    """Returns accuracy, precision, recall and F1 of "yes", and the share of "yes" among the answers, in [0, 1].

    A quotient without a denominator (a split without any yes) is 0; POPE's script fails there.
    """
    pairs = list(zip(answers, [gold != "no" for gold in golds], strict=True))
    hits = sum(answer == "yes" and gold for answer, gold in pairs)
    false_alarms = sum(answer == "yes" and not gold for answer, gold in pairs)
    correct = hits + sum(answer == "no" and not gold for answer, gold in pairs)
    precision = _share(hits, hits + false_alarms)
    recall = _share(hits, sum(gold for _, gold in pairs))
    return {
        "f1": _share(2 * precision * recall, precision + recall),
        "accuracy": _share(correct, len(pairs)),
        "precision": precision,
        "recall": recall,
        "yes_ratio": _share(hits + false_alarms, len(pairs)),
    }


def detection_scores_lmms_eval(answers: Sequence[YesNo], golds: Sequence[str]) -> dict[str, float]:
    """Returns lmms-eval's scores: a gold yes that is answered neither yes nor no is not in the recall, and its ratio
    of "yes" is that of the gold answers."""
    scores = detection_scores(answers, golds)
    pairs = list(zip(answers, golds, strict=True))
    hits, misses = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
    precision, recall = scores["precision"], _share(hits, hits + misses)
    return scores | {"recall": recall, "f1": _share(2 * (precision * recall), precision + recall),
                     "yes_ratio": _share(sum(gold == "yes" for gold in golds), len(golds))}


def mme_score(right: Sequence[Sequence[bool]]) -> float:
    """Returns a task's points: 100 times the share of right answers plus 100 times that of images with all right.

    Args:
      right: of each image, whether each of its (two) questions is answered right.
    """
    answers = [answer for image in right for answer in image]
    return sum(answers) / len(answers) * 100 + sum(len(image) == 2 and all(image) for image in right) / len(right) * 100


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
