"""Rotary positions: one operation (`rotate`), as a TPU kernel and in plain XLA."""

from vocojax.kernels.rotary.api import Rotation, rotate

__all__ = ["Rotation", "rotate"]
