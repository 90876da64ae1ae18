"""The protocol of a benchmark. A new one is a module of this folder with a class that has these methods."""

from collections.abc import Sequence
from typing import Protocol

from vocojax.evaluation.retention import Score
from vocojax.inference.requests import Answer, Request


class Benchmark(Protocol):
    """Questions with their images, and the rule that scores answers to them.

    `inference.many.answer_many` answers `requests()`; `retention.table` compares the scores of several models. Metrics
    are functions of `evaluation/metrics.py`.
    """

    def requests(self) -> list[Request]:
        """Returns the benchmark's questions as requests, each with its image files."""
        ...

    def score(self, answers: Sequence[Answer]) -> Score:
        """Returns the score of answers to `requests()`, in their order."""
        ...
