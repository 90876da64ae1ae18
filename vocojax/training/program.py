"""The program of a stage: its optimizer step jitted for a mesh, and the shape, dtype and sharding of all it works on.

Nothing here touches a device, so the program that trains is also the one compiled for a machine that is not there.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from vocojax.config import ConfigError
from vocojax.models.gathering import cut
from vocojax.models.lora import add_lora, factor_names
from vocojax.models.parameters import Parameters, abstract, variables_of
from vocojax.models.voco import VocoLlama
from vocojax.parallel.mesh import BATCH, BATCH_AXES, replicated
from vocojax.parallel.shardings import over_devices, parameter_shardings, parts_of
from vocojax.training.config import StageConfig
from vocojax.training.optimizer import learning_rate_multipliers, make_optimizer, with_multipliers
from vocojax.training.plan import empty_row
from vocojax.training.step import Evaluate, Gradient, Step, TrainState, make_evaluation, make_step


@dataclass(frozen=True)
class Program:
    """A stage on a mesh.

    Attributes:
      mesh: to be in force (`jax.set_mesh`) whenever `step` is traced.
      model: abstract; the state holds its parameters.
      multipliers: of the learning rate, by the names of the parameters that train.
      optimizer: of what trains; the state holds its moments.
      abstract_state: `jax.ShapeDtypeStruct`s with shardings: what `step` takes and a restored checkpoint fills.
      abstract_batch: likewise, of the batch.
      step: jitted (state, batch) -> (state, metrics); the state is donated.
      evaluate: jitted (state, batch) -> the sums that the step's objective is made of; compiled if it is called.
    """

    mesh: Mesh
    model: VocoLlama
    multipliers: Mapping[str, float]
    optimizer: optax.GradientTransformation
    abstract_state: TrainState
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    step: Step
    evaluate: Evaluate

    @property
    def abstract_parameters(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Every parameter of the model, trained or not, by name and in sorted order."""
        parts: Any = {**self.abstract_state.trained, **self.abstract_state.frozen}
        return dict(sorted(parts.items()))


def make_program(config: StageConfig, mesh: Mesh) -> Program:
    """Returns the program of a stage.

    Raises:
      ConfigError: `learning_rates` does not cover every parameter, or the batch does not divide over the mesh.
    """
    _check_batch(config, mesh)
    model = abstract(lambda: make_model(config, nnx.Rngs(0)))
    teacher = abstract(lambda: VocoLlama(config.teacher_model, nnx.Rngs(0), config.dtype)) if (
        config.distill.teacher) else None
    multipliers = learning_rate_multipliers(variables_of(model), config.learning_rates)
    _check_lora(config, model, multipliers)
    optimizer = with_multipliers(make_optimizer(config.optimizer, config.steps), multipliers)
    shardings = parameter_shardings(model, mesh)
    state = _abstract_state(config, model, multipliers, teacher, optimizer, mesh, shardings)
    batch = _abstract_batch(config, mesh)

    # The functions of one device gather the parameters that are cut; `distribute` runs them on all devices.
    parts = parts_of(shardings, mesh)
    model_in_parts = cut(model, parts, config.dtype)
    teacher_in_parts = None if teacher is None else cut(teacher, parts, config.dtype)
    distribute = functools.partial(over_devices, mesh=mesh, shardings=shardings) if mesh.size > 1 else _as_it_is
    axes = BATCH_AXES if mesh.size > 1 else ()
    step = make_step(model_in_parts, teacher_in_parts, optimizer, config, distribute, axes)
    evaluate = make_evaluation(model_in_parts, teacher_in_parts, config, distribute, axes)

    # The new state keeps the old one's shardings, so that nothing is compiled twice and every donated buffer is used.
    state_shardings, batch_shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, batch))
    taken = state_shardings, batch_shardings
    step = jax.jit(step, donate_argnums=0, in_shardings=taken, out_shardings=(state_shardings, None))
    evaluate = jax.jit(evaluate, in_shardings=taken, out_shardings=replicated(mesh))
    return Program(mesh, model, multipliers, optimizer, state, batch, step, evaluate)


def _as_it_is(gradient: Gradient) -> Gradient:
    return gradient


def _check_batch(config: StageConfig, mesh: Mesh) -> None:
    """Raises `ConfigError` unless the rows of a part of a batch divide over the devices."""
    rows, ways = config.batch_size // config.accumulate, math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % ways:
        raise ConfigError("batch_size", f"/ accumulate must be a multiple of slice x data x fsdp = {ways} devices, got "
                          f"{rows}")


def make_model(config: StageConfig, rngs: nnx.Rngs) -> VocoLlama:
    """Returns the model that the stage trains, with the factors of its LoRA."""
    model = VocoLlama(config.model, rngs, config.dtype)
    add_lora(model, config.lora, rngs)
    return model


def _check_lora(config: StageConfig, model: VocoLlama, multipliers: Mapping[str, float]) -> None:
    """Raises `ConfigError` unless factors train and their kernels don't, and dropout is only for decoder layers."""
    names = variables_of(model)
    for kernel in (name for name in names if factor_names(name)[0] in names):
        if config.lora.dropout and not kernel.startswith("decoder/blocks/"):
            raise ConfigError("lora.dropout", f"is only for targets in the decoder's layers, but lora.targets match "
                              f"{kernel!r}; set it to 0, or leave that target out")
        if kernel in multipliers or not all(factor in multipliers for factor in factor_names(kernel)):
            raise ConfigError("learning_rates", f"must freeze {kernel!r} and train its factors {factor_names(kernel)}, "
                              "as the rules of configs/voco_lora.py do")


def _abstract_state(
    config: StageConfig,
    model: VocoLlama,
    multipliers: Mapping[str, float],
    teacher: VocoLlama | None,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: Mapping[str, NamedSharding],
) -> TrainState:
    """Returns shapes and shardings of the state: fp32 masters of what trains, the rest as `frozen_dtype`."""
    shapes = {name: variable.shape for name, variable in variables_of(model).items()}

    def leaf(name: str, dtype: DTypeLike) -> Any:
        return jax.ShapeDtypeStruct(shapes[name], dtype, sharding=shardings[name])

    trained: Parameters = {name: leaf(name, jnp.float32) for name in shapes if name in multipliers}
    frozen: Parameters = {name: leaf(name, config.frozen_dtype) for name in shapes if name not in trained}
    taught_by = () if teacher is None else variables_of(teacher)  # without factors, which are merged as it is read
    teaching: Parameters = {name: leaf(name, config.frozen_dtype) for name in taught_by}
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    moments = _abstract_moments(optimizer, trained, mesh)
    return TrainState(step, trained, frozen, moments, teaching, dict(trained) if config.optimizer.ema else {})


def _abstract_moments(optimizer: optax.GradientTransformation, trained: Any, mesh: Mesh) -> Any:
    """Returns shapes and shardings of the optimizer's state: moments are sharded like their parameters."""
    shapes = jax.eval_shape(optimizer.init, trained)
    with_sharding = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return optax.tree_map_params(
        optimizer, lambda leaf, parameter: with_sharding(leaf, parameter.sharding), shapes, trained,
        transform_non_params=lambda leaf: with_sharding(leaf, replicated(mesh)),
    )


def _abstract_batch(config: StageConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and shardings of a batch: an empty row tells them."""
    rows = NamedSharding(mesh, BATCH)
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *array.shape), array.dtype, sharding=rows)
        for name, array in empty_row(config).items()
    }
