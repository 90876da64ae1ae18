"""Exact match, and means over groups of questions."""

import string
from collections.abc import Hashable, Sequence
from typing import TypeVar

Kind = TypeVar("Kind", bound=Hashable)


def exact_match(answer: str, gold: str) -> bool:
    """Returns whether the two are equal apart from white space around them, a final period and case."""
    clean = lambda text: text.strip().rstrip(".").lower()
    return clean(answer) == clean(gold)


def accuracy_by_kind(correct: Sequence[float], kinds: Sequence[Kind]) -> dict[Kind, float]:
    """Returns the mean of the marks for every kind of question, kinds in sorted order.

    Args:
      correct: the mark of each answer, 0 to 1.
      kinds: of each question, as many.
    """
    groups: dict[Kind, list[float]] = {}
    for mark, kind in zip(correct, kinds, strict=True):
        groups.setdefault(kind, []).append(mark)
    return {kind: sum(groups[kind]) / len(groups[kind]) for kind in sorted(groups)}  # type: ignore[type-var]


def gqa_answer(text: str) -> str:
    """Returns what LLaVA submits to GQA's script, which compares it with the gold answer as it is."""
    return text.rstrip(".").lower()


def gqa_distribution(gold: Sequence[str], predicted: Sequence[str], groups: Sequence[str | None]) -> float | None:
    """Returns GQA's distribution score: chi-square of the answers within each group, over 100; lower is better.

    Args:
      gold: the gold answers.
      predicted: the answers, as many.
      groups: each question's global group; None for a question that has none.

    Returns:
      The mean over the groups, weighted by their sizes; None if no question has a group.
    """
    counts: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    for right, answer, group in zip(gold, predicted, groups, strict=True):
        if group is not None:
            for histogram, text in zip(counts.setdefault(group, ({}, {})), (right, answer), strict=True):
                histogram[text] = histogram.get(text, 0) + 1
    total = weights = 0.0
    for expected, observed in counts.values():
        score = 0.0
        for answer, count in expected.items():
            score += (float(observed.get(answer, 0) - count) ** 2) / count
        size = sum(expected.values())
        total += score * size
        weights += size
    return total / weights / 100 if weights else None


def without_punctuation(text: str) -> str:
    """Returns a text in lower case without ASCII punctuation, as lmms-eval's exact match compares it."""
    return text.lower().translate(str.maketrans("", "", string.punctuation))
