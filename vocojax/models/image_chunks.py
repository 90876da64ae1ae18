"""Images in chunks of which only those that hold an image run through the vision tower.

Rows have a fixed number of slots for images, and many stay empty. So the images of all rows are moved to the front and
cut into chunks, and every layer of the tower runs the first chunks only. A layer is gathered outside of the loop over
chunks.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from vocojax.kernels.sharding import device_kind

Block = TypeVar("Block", bound=nnx.Module)

# Images of a chunk where the scores of so few stay in VMEM, by the kind of device. By the compiler's cycles chunks of 2
# are a fifth faster than of 8 on v5e, and slower on v5p.
FEW = {"TPU v5 lite": 2, "TPU v5e": 2}


class ImageChunks(NamedTuple):
    """Where the images of rows are: A = B * U slots in X chunks, those with an image first.

    Attributes:
      order_A: int32, the slot of each place.
      place_A: int32, the place of each slot.
      filled: int32, how many chunks have an image.
      size: static; places of a chunk.
    """

    order_A: jax.Array
    place_A: jax.Array
    filled: jax.Array
    size: int

    @classmethod
    def of(cls, vision_BS: jax.Array, slots: int, tokens: int, axes: tuple[str, ...]) -> ImageChunks:
        """Returns the chunks of rows' images; a slot holds an image if any token of its row is of it.

        Args:
          vision_BS: see `Rows`.
          slots: of a row, U.
          tokens: of an image, P.
          axes: mesh axes of the devices that run as many chunks as the one that needs most; `()` for one device.
        """
        slot_U1 = jnp.arange(slots, dtype=jnp.int32)[:, None]
        slot_B1S = jnp.where(vision_BS >= 0, vision_BS // tokens, -1)[:, None]
        is_filled_A = (slot_B1S == slot_U1).any(-1).reshape(-1)
        order_A = jnp.argsort(~is_filled_A, stable=True)
        size = chunk_size(len(vision_BS), slots, device_kind())
        filled = -(-is_filled_A.sum(dtype=jnp.int32) // size)
        return cls(order_A, jnp.argsort(order_A), jax.lax.pmax(filled, axes) if axes else filled, size)


def chunk_size(rows: int, slots: int, kind: str) -> int:
    """Returns the images of a chunk, one per row or `FEW` for this kind of device. It divides all slots."""
    return math.gcd(rows * slots, FEW[kind]) if kind in FEW else rows


def run_filled(block: Block, x_ASE: jax.Array, chunks: ImageChunks | None) -> jax.Array:
    """Returns a layer's output for images; those of chunks without an image stay as they are.

    The backward pass runs the layer again, chunk after chunk, so that it keeps nothing but the layer's input.

    Args:
      block: a layer [.., S, E] -> [.., S, E] that computes every image alone.
      x_ASE: the images' states.
      chunks: of the images; None runs all images at once.
    """
    if chunks is None or chunks.size == len(x_ASE):
        return block(x_ASE)
    graphdef, state = nnx.split(block)
    x_XCSE = x_ASE.reshape(-1, chunks.size, *x_ASE.shape[1:])
    return _run(graphdef, state, x_XCSE, chunks.filled).reshape(x_ASE.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(graphdef: nnx.GraphDef[Any], state: nnx.State, x_XCSE: jax.Array, filled: jax.Array) -> jax.Array:
    def run(n: Any, x_XCSE: jax.Array) -> jax.Array:
        return x_XCSE.at[n].set(nnx.merge(graphdef, state)(x_XCSE[n]))

    return jax.lax.fori_loop(0, filled, run, x_XCSE)


def _run_forward(
    graphdef: nnx.GraphDef[Any], state: nnx.State, x_XCSE: jax.Array, filled: jax.Array
) -> tuple[jax.Array, Any]:
    return _run(graphdef, state, x_XCSE, filled), (state, x_XCSE, filled)


def _run_backward(
    graphdef: nnx.GraphDef[Any], saved: Any, grad_XCSE: jax.Array
) -> tuple[nnx.State, jax.Array, None]:
    state, x_XCSE, filled = saved

    def run(n: Any, total: tuple[nnx.State, jax.Array]) -> tuple[nnx.State, jax.Array]:
        state_grad, grad_XCSE = total
        _, transposed = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x), state, x_XCSE[n])
        more, x_grad = transposed(grad_XCSE[n])
        # Chunks are summed in fp32, whatever the layer's dtype.
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), state_grad, more), (
            grad_XCSE.at[n].set(x_grad))

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), state)
    state_grad, x_grad_XCSE = jax.lax.fori_loop(0, filled, run, (nothing, grad_XCSE))
    return jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), state_grad, state), x_grad_XCSE, None


_run.defvjp(_run_forward, _run_backward)
