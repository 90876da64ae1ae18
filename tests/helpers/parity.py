"""What the parity tests share: torch tensors as `Tensors`, and modules filled from them."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from vocojax.convert.mapped import MappedWeights
from vocojax.convert.mapping import Rule, Table
from vocojax.models.compressors import QFormer
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


def fill_qformer(ours: QFormer, state_dict: Mapping[str, torch.Tensor], depth: int, every: int) -> None:
    """Gives a Q-Former the parameters of transformers' one, BLIP-2's or InstructBLIP's.

    Args:
      ours: is filled; its queries and the norm of the vision features stay.
      state_dict: of transformers' Q-Former.
      depth: number of its layers.
      every: the first of so many layers has cross attention.
    """
    tensors = TorchTensors(state_dict)
    blocks = {"attention.attention.query": "attention/query", "attention.attention.key": "attention/key",
              "attention.attention.value": "attention/value", "attention.output.dense": "attention/out",
              "attention.output.LayerNorm": "attention_norm", "intermediate_query.dense": "mlp_in",
              "output_query.dense": "mlp_out", "output_query.LayerNorm": "mlp_norm"}
    crossing = {"cross" + name: "cross_" + path for name, path in blocks.items() if name.startswith("attention")}
    if "encoder.layer.0.intermediate.dense.weight" in tensors.shapes:
        blocks |= {"intermediate.dense": "text_mlp_in", "output.dense": "text_mlp_out",
                   "output.LayerNorm": "text_mlp_norm"}

    def put(path: str, arrays: list[str], leading: tuple[int, ...]) -> None:
        module = ours
        for part in path.split("/"):
            module = getattr(module, part)
        for theirs_name, ours_name in (("weight", "scale" if "norm" in path else "kernel"), ("bias", "bias")):
            values = np.stack([tensors.read(f"{name}.{theirs_name}") for name in arrays])
            values = values.swapaxes(-1, -2) if ours_name == "kernel" else values
            variable = getattr(module, ours_name)
            assert values.size == variable.size
            variable[...] = jnp.asarray(values.reshape(*leading, *values.shape[1:]))

    groups = depth // every
    layer = lambda index, name: f"encoder.layer.{index}.{name}"
    for name, path in {**blocks, **crossing}.items():
        put(f"groups/crossing/{path}", [layer(group * every, name) for group in range(groups)], (groups,))
        if every > 1 and name in blocks:
            rest = [layer(group * every + 1 + i, name) for group in range(groups) for i in range(every - 1)]
            put(f"groups/rest/{path}", rest, (groups, every - 1))
    [norm] = [name for name in ("layernorm", "embeddings.layernorm") if f"{name}.weight" in tensors.shapes]
    ours.query_norm.scale[...] = tensors.read(f"{norm}.weight")
    ours.query_norm.bias[...] = tensors.read(f"{norm}.bias")
