"""Metrics with their official definitions."""

from collections.abc import Sequence


def exact_match(answer: str, gold: str) -> bool:
    """Returns whether the two are equal apart from white space around them, a final period and case."""
    clean = lambda text: text.strip().rstrip(".").lower()
    return clean(answer) == clean(gold)


def accuracy_by_kind(correct: Sequence[bool], kinds: Sequence[str]) -> dict[str, float]:
    """Returns the share of correct answers for every kind of question, kinds in sorted order.

    Args:
      correct: of each answer.
      kinds: of each question, as many.
    """
    groups: dict[str, list[bool]] = {}
    for is_correct, kind in zip(correct, kinds, strict=True):
        groups.setdefault(kind, []).append(is_correct)
    return {kind: sum(group) / len(group) for kind, group in sorted(groups.items())}
