"""Metrics with their official definitions, as functions of texts: no files, no benchmarks."""

from vocojax.evaluation.metrics.exact import accuracy_by_kind, exact_match

__all__ = ["accuracy_by_kind", "exact_match"]
