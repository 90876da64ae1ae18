"""Low-rank adaptation (LoRA, arXiv 2106.09685): a frozen kernel W acts as W + scale A B, where A and B train.

A layer computes `x W + scale (x A) B`, so that neither the sum nor its gradient ever exists in training. The factors of
`X/kernel` are the parameters `X/lora/a` [in, rank] and `X/lora/b` [rank, out], stacked like the kernel.

In training some elements of x may be dropped before A, as PEFT's `lora_dropout` does; W sees all of x. The mask of a
row depends only on the row's key, the layer and the kernel's name, and so on no mesh, no part of a batch and no
rematerialisation. A model has dropout only where `with_dropout` gave it keys; nothing else draws random numbers.
"""

import re
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

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
Model = TypeVar("Model", bound=nnx.Module)


class MaskKeys(nnx.Variable[jax.Array]):
    """The keys of a layer's dropout masks, one for each row: [B], or [L, B] in a stack."""


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
        self.scale, self.dropout = config.scale, config.dropout
        self.mask_keys: MaskKeys | None = None  # `with_dropout` sets it

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the term [tokens, out] for x [tokens, in], the tokens of all rows one after the other."""
        if self.mask_keys is not None:
            x = _dropped(x, self.mask_keys[...], self.dropout)
        low = x @ self.a[...].astype(x.dtype)
        return (self.scale * low) @ self.b[...].astype(x.dtype)


def _dropped(x: jax.Array, keys_B: jax.Array, rate: float) -> jax.Array:
    """Returns x [B * S, E] with elements set to 0 at that rate, and the others divided by 1 - rate."""
    x_BSE = x.reshape(len(keys_B), -1, x.shape[-1])
    is_kept_BSE = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BSE.shape[1:]))(keys_B)
    return jnp.where(is_kept_BSE, x_BSE / (1 - rate), 0).reshape(x.shape)


def with_dropout(model: Model, keys_B: jax.Array) -> Model:
    """Returns a copy of a model whose LoRA layers drop elements of their input, for rows with these keys.

    Args:
      model: all of its LoRA layers run on the same B rows.
      keys_B: typed PRNG keys, one for each row.
    """
    model = nnx.merge(*nnx.split(model))
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, LowRank):
            name = zlib.crc32("/".join(map(str, path)).encode())
            own_B = jax.vmap(lambda key, name=name: jax.random.fold_in(key, name))(keys_B)
            if module.a.ndim == 3:
                layers = jnp.arange(len(module.a))
                own_B = jax.vmap(lambda layer, keys=own_B: jax.vmap(jax.random.fold_in, (0, None))(keys, layer))(layers)
            module.mask_keys = nnx.data(MaskKeys(own_B))
    return model


def row_keys(key: jax.Array, *numbers: jax.Array) -> jax.Array:
    """Returns a key [B] for each row, made of one key and int32 arrays [B] which together name the row."""
    keys_B = jnp.broadcast_to(key, numbers[0].shape)
    for number_B in numbers:
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, number_B)
    return keys_B


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
