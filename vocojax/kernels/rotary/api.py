"""`rotate`: rotary position embedding (arXiv 2104.09864), by a TPU kernel or by XLA."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vocojax.kernels.sharding import per_shard


class Rotation(NamedTuple):
    """The angles by which the heads of each token are rotated; made once and used by every layer.

    A head's pairs are (d, d + D/2), as in the LLaMA weights.

    Attributes:
      cos_BSD: fp32 [B, S, D], cosines of the pairs' angles, for both elements of a pair.
      sin_BSD: fp32 [B, S, D], sines with the sign of the other element: minus for the first of a pair.
    """

    cos_BSD: jax.Array
    sin_BSD: jax.Array

    @classmethod
    def of(cls, positions_BS: jax.Array, frequencies: np.ndarray | jax.Array) -> Rotation:
        """Returns the rotation of tokens at these positions.

        Args:
          positions_BS: int.
          frequencies: fp32 [D/2], radians per position of each pair.
        """
        angles = positions_BS[..., None].astype(jnp.float32) * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return cls(jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1))

    @property
    def back(self) -> Rotation:
        """The inverse rotation."""
        return Rotation(self.cos_BSD, -self.sin_BSD)


def rotate(x_BSHD: jax.Array, rotation: Rotation, *, implementation: str | None = None) -> jax.Array:
    """Rotates the heads of every token, in fp32 and rounded once to the dtype of x.

    So is the gradient of x, which is rotated back; the rotation has no gradient. Rotations compose: by p and then by t
    is by p + t.

    Args:
      x_BSHD: float heads; D is even.
      rotation: of its tokens. XLA broadcasts it to any leading axes of x.
      implementation: that of the attention that follows. With 'pallas_tpu', and with None on a TPU, a kernel rotates
        heads that fill registers. It leaves them in the layout that attention's kernel takes; XLA would copy them into
        another one and back. XLA rotates all other heads.

    Raises:
      ValueError: the kernel is given a rotation of other tokens.
    """
    if implementation is None and jax.default_backend() == "tpu":
        implementation = "pallas_tpu"
    if implementation != "pallas_tpu":
        return _by_xla(x_BSHD, rotation)
    B, S, _, D = x_BSHD.shape
    if rotation.cos_BSD.shape != (B, S, D):
        raise ValueError(f"rotation is {rotation.cos_BSD.shape}, but x {x_BSHD.shape}: make it of x's own positions")
    return _by_kernel(x_BSHD, rotation)


@jax.custom_vjp
def _by_xla(x_BSHD: jax.Array, rotation: Rotation) -> jax.Array:
    half = x_BSHD.shape[-1] // 2
    x = x_BSHD.astype(jnp.float32)
    others = jnp.concatenate([x[..., half:], x[..., :half]], axis=-1)
    return (x * rotation.cos_BSD[..., None, :] + others * rotation.sin_BSD[..., None, :]).astype(x_BSHD.dtype)


@jax.custom_vjp
def _by_kernel(x_BSHD: jax.Array, rotation: Rotation) -> jax.Array:
    from vocojax.kernels.rotary import pallas_tpu  # Pallas takes a good part of a second to load

    def own(x: jax.Array, *tables: jax.Array) -> tuple[jax.Array]:
        """Rotates the heads that one device has."""
        return pallas_tpu.rotate(x, *tables) if pallas_tpu.takes(*x.shape[2:]) else (_by_xla(x, Rotation(*tables)),)

    rows, heads = x_BSHD.shape[0], x_BSHD.shape[2]
    return per_shard(own, ["BSHD", "BSD", "BSD"], ["BSHD"], rows, heads, heads)(x_BSHD, *rotation)[0]


# Automatic differentiation would round the two terms of a gradient before it adds them.
_by_xla.defvjp(lambda x, rotation: (_by_xla(x, rotation), rotation),
               lambda rotation, grad: (_by_xla(grad, rotation.back), None))
_by_kernel.defvjp(lambda x, rotation: (_by_kernel(x, rotation), rotation),
                  lambda rotation, grad: (_by_kernel(grad, rotation.back), None))
