"""Rotary positions: one operation, a TPU kernel and plain XLA, one contract (`rotate`)."""

from vocojax.kernels.rotary.api import Rotation, rotate

__all__ = ["Rotation", "rotate"]
