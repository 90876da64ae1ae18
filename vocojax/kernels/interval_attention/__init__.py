"""Attention under an interval mask: one operation, several implementations, one contract (`interval_attention`)."""

from vocojax.kernels.interval_attention.api import interval_attention
from vocojax.kernels.interval_attention.mask import IntervalMask
from vocojax.kernels.interval_attention.one_query import one_query_attention

__all__ = ["IntervalMask", "interval_attention", "one_query_attention"]
