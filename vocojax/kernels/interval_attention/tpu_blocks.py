"""Block sizes of the TPU kernels, per generation and shape: chosen with `launch/kernel_report.py`, not at run time."""

from __future__ import annotations

import dataclasses

from vocojax import devices
from vocojax.devices import MIB

LANES = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one pass cuts its work.

    Attributes:
      q: queries of a tile.
      k: keys of a tile.
      columns: heads of one grid step times their (padded) width. Several heads in one step share the mask, share the
        cost of the step, and give the scheduler independent chains of work to interleave.
      transposed_dq: accumulates the gradient of q as `[D, Q]`. A matrix unit wider than the head width is then fed full
        rows. Backward pass only.
      together: heads that take every stage of a tile together. Backward pass only.
    """

    q: int
    k: int
    columns: int
    transposed_dq: bool = False
    together: int = 1


@dataclasses.dataclass(frozen=True)
class Generation:
    """Blocks of a TPU generation, and the VMEM that its kernels may plan with.

    Attributes:
      forward: of the forward pass, for sequences of more than `SHORT` keys and up to `PACKED`.
      forward_long: of the forward pass, for more.
      backward: of the backward pass, likewise, for up to `PACKED` keys.
      backward_long: of the backward pass, for more.
      dq_bytes: the most that the backward pass may keep of one span of dq. Longer rows are cut into spans.
      vmem_bytes: the limit given to the compiler.
    """

    forward: Blocks
    forward_long: Blocks
    backward: Blocks
    backward_long: Blocks
    dq_bytes: int
    vmem_bytes: int

    def forward_of(self, keys: int) -> Blocks:
        """Returns the blocks of the forward pass for rows of that many keys."""
        return self.forward if keys <= PACKED else self.forward_long

    def backward_of(self, keys: int) -> Blocks:
        """Returns the blocks of the backward pass for rows of that many keys."""
        return self.backward if keys <= PACKED else self.backward_long


# Pieces of packed rows do not fill their tiles. On typical rows of 2,048 tokens (static cost, libtpu 0.0.42.1), of the
# pairs in tiles of 512 x 512, 256 x 256, 256 x 128 and 128 x 128, the visible are 31, 47, 49 and 64 %.
# In the forward pass the matrix units are busy 57 % of the time with 256 x 128 of 32 heads on v5e, 59 % with 16 heads
# on v5p: visible pairs take 28 and 29 % of it. v5p has two cores, which share the groups of heads, so one group would
# leave a core idle. A full tile of a head takes 165 cycles (186 of 16 heads), its products 128. Of the rest, 9 (21) are
# the grid step, most others the start and end of the chain of heads. A query block's opening, closing, and DMA of
# queries and output, longer than its few tiles (4.5 in the mean) can hide, are a fifth of the pass. Tiles of 128 x 128
# would wait for the DMA of keys and values. On v5p causal rows of 8,192 take 1.68 ms, 3 % more than with scores not
# transposed.
# In the backward pass the matrix units are busy 80 % with 512 x 512 on v5e, and 56 % with 256 x 256 of 4 heads, one
# after another. With 16 heads, two at a time, it is 77 %: visible pairs take 36 % of the kernel's time in place of 24
# (v5p: 38 in place of 25). 16 heads, because a step takes about 500 cycles before it computes anything, and the first
# and the last two heads leave units idle. Products of outputs and gradients, bound by HBM, are another 12 % of the
# kernel's time (v5p: 9 %). On long causal rows dq leaves no room for 16 heads. With 8 such tiles take 13 % more per
# pair than 512 x 512 of 4 heads one after another (two at a time: 21 %).
GENERATIONS = {
    "v4": Generation(
        forward=Blocks(256, 128, 1024), forward_long=Blocks(512, 512, 256),
        backward=Blocks(512, 512, 128), backward_long=Blocks(512, 512, 128), dq_bytes=6 * MIB, vmem_bytes=16 * MIB,
    ),
    "v5e": Generation(
        forward=Blocks(256, 128, 4096), forward_long=Blocks(256, 128, 4096),
        backward=Blocks(256, 256, 2048, together=2), backward_long=Blocks(512, 512, 512),
        dq_bytes=72 * MIB, vmem_bytes=112 * MIB,
    ),
    "v5p": Generation(
        forward=Blocks(256, 128, 2048), forward_long=Blocks(512, 128, 2048),
        backward=Blocks(256, 256, 2048, together=2), backward_long=Blocks(512, 512, 512),
        dq_bytes=36 * MIB, vmem_bytes=56 * MIB,
    ),
    "v6e": Generation(
        forward=Blocks(256, 256, 4096), forward_long=Blocks(256, 256, 4096),
        backward=Blocks(256, 256, 2048, transposed_dq=True, together=2),
        backward_long=Blocks(512, 512, 512, transposed_dq=True),
        dq_bytes=72 * MIB, vmem_bytes=112 * MIB,
    ),
}  # fmt: skip
PACKED = 2048  # up to here rows are taken to be packed with short pieces
SHORT = 1024  # up to here a tile of 512 would be mostly padding and diagonal


def generation(device_kind: str) -> str:
    """Returns the row of the table for a device kind as JAX reports it; for an unknown kind the most frugal one, v4."""
    chip = devices.tpu(device_kind)
    return chip.generation if chip else "v4"


def fitted(blocks: Blocks, queries: int, keys: int) -> Blocks:
    """Returns the blocks for a shape: no larger than the (padded) sequence, and 256 where it is short."""
    most = 256 if keys <= SHORT else max(blocks.q, blocks.k)
    fit = lambda block, length: min(block, most, -(-length // LANES) * LANES)
    return dataclasses.replace(blocks, q=fit(blocks.q, queries), k=fit(blocks.k, keys))


def shared_by_cores(blocks: Blocks, generation: str, columns: int) -> Blocks:
    """Returns the blocks for arrays of so many columns. A chip's cores share the steps' groups of heads, so a step has
    the heads of one core at most."""
    return dataclasses.replace(blocks, columns=min(blocks.columns, columns // devices.TPUS[generation].cores))
