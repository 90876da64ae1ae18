"""Stacked layers, the scan that runs them, and rematerialisation policies by name."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vocojax.errors import InputError
from vocojax.models.gathering import gathered, in_parts

Block = TypeVar("Block", bound=nnx.Module)
Carry = TypeVar("Carry")

# What the forward pass of a block keeps for the backward pass; everything else is computed again. All policies keep the
# input of every block, and one number per token and norm. `offload` is `full`, but keeps inputs in the host's memory.
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": jax.checkpoint_policies.save_anything_except_these_names("gathered"),  # parts are gathered again
    "full": jax.checkpoint_policies.save_only_these_names("norm"),
    "minimal": jax.checkpoint_policies.save_only_these_names("linear", "norm"),
    "attention_out": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse", "norm"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["norm"], names_which_can_be_offloaded=["block_input"],
        offload_src="device", offload_dst="pinned_host",
    ),
}


def remat_policy(name: str) -> Callable[..., Any] | None:
    """Returns the policy of that name.

    Raises:
      ValueError: there is none; the message lists the names.
    """
    if name not in REMAT_POLICIES:
        raise InputError(f"remat must be one of {sorted(REMAT_POLICIES)}, got {name!r}")
    return REMAT_POLICIES[name]


def stack(make: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """Builds one module whose parameters are those of `depth` blocks, stacked on a leading `layers` axis.

    Args:
      make: builds one block from its own `nnx.Rngs`.
    """
    stacked = nnx.transform_metadata(nnx.vmap(make), in_axes=None, out_axes=0, partition="layers")
    return stacked(rngs.split(depth))


def scan(
    body: Callable[[Carry, Block, Any], tuple[Carry, Any]],
    x: Carry,
    blocks: Block,
    per_layer: Any = None,
    *,
    remat: str = "none",
) -> tuple[Carry, Any]:
    """Runs `x`, an array or a pytree of them, through the stacked blocks.

    Args:
      body: (x, block, this layer's slice of `per_layer`) -> (x, what to stack over layers).
      per_layer: a pytree whose leaves have a leading layer axis, or None.
      remat: a key of `REMAT_POLICIES`.

    Returns:
      The last x, and the stacked second outputs.
    """

    def step(carry: Carry, layer: tuple[Block, Any]) -> tuple[Carry, Any]:
        carry = jax.tree.map(lambda leaf: checkpoint_name(leaf, "block_input"), carry)
        return body(carry, gathered(layer[0], stacked=True), layer[1])

    policy = remat_policy(remat)
    if remat != "none" or in_parts(blocks):
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
    return jax.lax.scan(step, x, (blocks, per_layer))
