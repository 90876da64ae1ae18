"""What the parity tests share: torch tensors as `Tensors`, and modules filled from them."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from vocojax.convert.mapped import MappedWeights
from vocojax.convert.mapping import Rule, Table
from vocojax.models.parameters import variables_of, with_parameters

TOLERANCE = 1e-4  # absolute, between float32 computations of the two libraries


class TorchTensors:
    """A torch state dict as the converter's `Tensors`."""

    where = "state dict"

    def __init__(self, state_dict: Mapping[str, torch.Tensor]):
        self._arrays = {name: tensor.detach().numpy() for name, tensor in state_dict.items()}
        self.shapes = {name: array.shape for name, array in self._arrays.items()}

    def dtype(self, name):
        return self._arrays[name].dtype

    def read(self, name, index=None):
        return self._arrays[name] if index is None else self._arrays[name][index]


def filled(module: nnx.Module, rules: list[Rule], state_dict: Mapping[str, torch.Tensor], prefix: str) -> nnx.Module:
    """The module with every parameter read from the state dict; `prefix` is the module's in the rules' paths."""
    shapes = {prefix + path: tuple(variable.shape) for path, variable in variables_of(module).items()}
    weights = MappedWeights(Table("test", tuple(rules)), TorchTensors(state_dict), shapes)
    return with_parameters(module, {path.removeprefix(prefix): jnp.asarray(weights.read(path)) for path in shapes})


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter random values far from what an initialiser gives (norms and biases too), so that one in
    the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.copy_(centre + scale * noise)
    return module.eval()


def assert_close(ours, theirs: torch.Tensor, what: str) -> None:
    """Within `TOLERANCE`; the error names `what`."""
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=0, atol=TOLERANCE, err_msg=what)
