"""Block sizes of the GPU kernels, per architecture: chosen with `launch/kernel_report.py`, not at run time."""

from __future__ import annotations

import dataclasses

from vocojax import devices


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one kernel cuts its work.

    Attributes:
      q: queries of a tile.
      k: keys of a tile.
      warps: of a program, for Triton.
      stages: of Triton's pipeline.
    """

    q: int
    k: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Blocks of the three kernels.

    Attributes:
      forward: of the forward pass.
      dq: of the gradient of q.
      dkv: of the gradients of k and v.
    """

    forward: Blocks
    dq: Blocks
    dkv: Blocks


# Two rows each: heads of up to 256 bytes (128 in bfloat16), and wider ones, which leave less room to a tile.
ARCHITECTURES = {
    "ampere": (
        Architecture(Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2)),
        Architecture(Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 1)),
    ),
    "hopper": (
        Architecture(Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
        Architecture(Blocks(128, 64, 8, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    ),
}


def chosen(architecture: str, head_bytes: int) -> Architecture:
    """Returns the blocks of the three kernels for heads whose width is this many bytes."""
    return ARCHITECTURES[architecture][head_bytes > 256]


def architecture(device_kind: str) -> str:
    """Returns the row of the table for a device kind as JAX reports it; for an unknown kind Ampere's."""
    return "hopper" if devices.is_hopper(device_kind) else "ampere"
