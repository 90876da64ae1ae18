"""Attention under an interval mask: one operation, several implementations, one contract (`interval_attention`)."""

from vocojax.kernels.interval_attention.api import interval_attention
from vocojax.kernels.interval_attention.mask import IntervalMask

__all__ = ["IntervalMask", "interval_attention"]
