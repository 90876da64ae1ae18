"""The weights of a run that trained factors (LoRA), merged as they are read."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vocojax.config import ConfigError, LoraConfig, build
from vocojax.errors import ConvertError
from vocojax.models.lora import factor_names, is_factor
from vocojax.weights import Index, Weights


class MergedWeights:
    """A run's parameters without its factors; the kernels that have some are W + scale A B, summed in fp32 and rounded
    to the kernel's dtype.

    Args:
      weights: the run's parameters, factors among them.
      scale: see `LoraConfig.scale`.
    """

    def __init__(self, weights: Weights, scale: float):
        self.where, self._weights, self._scale = weights.where, weights, scale
        self.shapes = {name: shape for name, shape in weights.shapes.items() if not is_factor(name)}
        self._last: tuple[str, np.ndarray] | None = None

    def dtype(self, name: str) -> np.dtype:
        """The parameter's dtype."""
        return self._weights.dtype(name)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A parameter, or the slice of it at `index`."""
        factors = factor_names(name)
        if factors[0] not in self._weights.shapes:
            return self._weights.read(name, index)
        if self._last is None or self._last[0] != name:
            self._last = None  # lets go of the one before first
            self._last = name, self._merge(name, *factors)
        return self._last[1] if index is None else self._last[1][index].copy()

    def _merge(self, name: str, *factors: str) -> np.ndarray:
        a, b = (self._weights.read(factor).astype(np.float32) for factor in factors)
        kernel = self._weights.read(name).copy()
        for layer in np.ndindex(kernel.shape[:-2]):  # one by one: a stack in fp32 is large
            kernel[layer] = kernel[layer].astype(np.float32) + np.float32(self._scale) * (a[layer] @ b[layer])
        return kernel


def merged(weights: Weights, values: Mapping[str, Any], where: str) -> Weights:
    """A run's weights with its factors, if it has any, merged; `values` is the run's config.

    Raises:
      ConvertError: the config doesn't say how the factors are scaled.
    """
    if not any(is_factor(name) for name in weights.shapes):
        return weights
    try:
        lora = build(LoraConfig, values.get("lora", {}), "lora")
    except ConfigError as error:
        raise ConvertError(f"{where}: {error}") from None
    if not lora.rank:
        raise ConvertError(f"{where}: has no lora.rank and lora.alpha, but the checkpoint has factors of LoRA")
    return MergedWeights(weights, lora.scale)
