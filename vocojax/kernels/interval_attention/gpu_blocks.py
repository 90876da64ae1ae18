"""Block sizes of the GPU kernels, per architecture: chosen with `launch/kernel_report.py`, not at run time."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one kernel cuts its work: queries and keys of a tile, and Triton's warps and pipeline stages."""

    q: int
    k: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The blocks of the three kernels: the forward pass, the gradient of q, the gradients of k and v."""

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
    """The blocks of the three kernels for heads whose width is this many bytes."""
    return ARCHITECTURES[architecture][head_bytes > 256]


def architecture(device_kind: str) -> str:
    """The table's name for a device kind as JAX reports it: Hopper where its name says so, else Ampere."""
    return "hopper" if any(name in device_kind for name in ("H100", "H200", "GH200")) else "ampere"
