"""Low-rank adaptation (LoRA, arXiv 2106.09685): a frozen kernel W acts as W + scale A B, where A and B train.

A layer computes `x W + scale (x A) B`, so that neither the sum nor its gradient ever exists in training. The factors of
`X/kernel` are the parameters `X/lora/a` [in, rank] and `X/lora/b` [rank, out], stacked like the kernel.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import ArrayLike

from vocojax.config import ConfigError, LoraConfig
from vocojax.models.layers import Linear, parameter
from vocojax.models.parameters import Parameters

# A is drawn as PEFT draws it: uniform within 1 / sqrt(in). B is zero, so the model begins unchanged.
_INIT_A = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_INIT_STACKED_A = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))
_HEAD = "decoder/head/kernel"  # no target, as in PEFT: `Decoder.logits` reads it directly


class LowRank(nnx.Module):
    """The term that LoRA adds to a linear layer's output, `scale (x A) B`.

    The rank takes the place, and the logical axis, of the side of the kernel that a factor does not have: factors are
    sharded like their kernel, over every mesh axis that divides the rank.
    """

    def __init__(self, kernel: nnx.Param, config: LoraConfig, rngs: nnx.Rngs):
        *layers, in_width, out_width = kernel.shape
        axes = kernel.get_metadata()["out_sharding"]
        self.a = parameter(_INIT_STACKED_A if layers else _INIT_A, (*layers, in_width, config.rank), axes, rngs)
        self.b = parameter(nnx.initializers.zeros, (*layers, config.rank, out_width), axes, rngs)
        self.scale = config.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        low = x @ self.a[...].astype(x.dtype)
        return (self.scale * low) @ self.b[...].astype(x.dtype)


def add_lora(model: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Adds factors to every linear layer of a model whose kernel's path matches a target; with rank 0 to none.

    Raises:
      ConfigError: a target matches no linear layer but the head.
    """
    if not config.rank:
        return
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    linears = {f"{path}/kernel": module for path, module in modules.items() if isinstance(module, Linear)}
    linears.pop(_HEAD, None)
    for pattern in config.targets:
        if not any(re.fullmatch(pattern, name) for name in linears):
            raise ConfigError("lora.targets", f"has the regex {pattern!r}, which matches no kernel of a linear layer "
                              "(decoder/blocks/query/kernel is one; the head can't be a target)")
    for name, linear in linears.items():
        if any(re.fullmatch(pattern, name) for pattern in config.targets):
            linear.lora = nnx.data(LowRank(linear.kernel, config, rngs))


def factor_names(kernel: str) -> tuple[str, str]:
    """Returns the paths of the factors A and B that belong to a kernel, if its layer has LoRA."""
    layer = kernel.removesuffix("kernel")
    return f"{layer}lora/a", f"{layer}lora/b"


def is_factor(name: str) -> bool:
    """Returns whether a parameter is one of the factors."""
    return name.endswith(("/lora/a", "/lora/b"))


def with_factors(
    wanted: Mapping[str, jax.ShapeDtypeStruct], saved: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what to read for `merge_factors`: the wanted parameters, and the factors that were saved with them.

    Kernels with factors, and the factors, are read in the precision they were saved in.

    Args:
      wanted: shapes, dtypes and shardings by name.
      saved: anything with shape and dtype, by name.
    """
    reading = dict(wanted)
    for name, leaf in wanted.items():
        for axis, factor in zip((-1, -2), factor_names(name), strict=True):
            if factor in saved and factor not in wanted:
                sharding = _whole_along(axis, leaf.sharding, len(leaf.shape))
                reading[factor] = jax.ShapeDtypeStruct(saved[factor].shape, saved[factor].dtype, sharding=sharding)
                reading[name] = jax.ShapeDtypeStruct(leaf.shape, saved[name].dtype, sharding=leaf.sharding)
    return reading


def merge_factors(parameters: Parameters, wanted: Mapping[str, jax.ShapeDtypeStruct], scale: float) -> Parameters:
    """Returns the wanted parameters, with every kernel that has factors merged with them in fp32: W + scale A B."""
    merged = {}
    for name, leaf in wanted.items():
        value, (a, b) = parameters.pop(name), factor_names(name)
        if a in parameters:
            sharded = jax.jit(merge, static_argnums=(3, 4), out_shardings=leaf.sharding)
            value = sharded(value, parameters.pop(a), parameters.pop(b), scale, jnp.dtype(leaf.dtype))
        merged[name] = value
    return merged


def merge(kernel: ArrayLike, a: ArrayLike, b: ArrayLike, scale: float, dtype: jnp.dtype) -> jax.Array:
    """Returns W + scale A B as `dtype`, summed in fp32: kernel [..., in, out] and its factors, stacked or not."""
    def one(parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        w, a, b = (part.astype(jnp.float32) for part in parts)
        return (w + scale * jnp.matmul(a, b, precision="highest")).astype(dtype)

    # Layer by layer: a whole stack in fp32 is large.
    parts = jnp.asarray(kernel), jnp.asarray(a), jnp.asarray(b)
    return one(parts) if parts[0].ndim == 2 else jax.lax.map(one, parts)


def _whole_along(axis: int, sharding: Sharding | None, ndim: int) -> Sharding | None:
    """Returns a kernel's sharding without the split of one axis, which in its factor is the rank."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    parts = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    parts[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*parts))
