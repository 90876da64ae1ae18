"""A training stage from its config: model, data, optimizer, step and loop put together."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from vocojax.config import ConfigError
from vocojax.data.loader import BatchStream
from vocojax.layout import Visibility
from vocojax.models.parameters import Parameters, abstract, parameters_of, variables_of
from vocojax.models.voco import VocoLlama
from vocojax.training import loop
from vocojax.training.checkpoints import Checkpoints, load_parameters, run_config, write_run_files
from vocojax.training.config import StageConfig, config_to_dict
from vocojax.training.optimizer import check_rules, make_optimizer, matches
from vocojax.training.sharding import make_mesh, parameter_shardings, replicated, shard_batch
from vocojax.training.step import TrainState, make_step

LOG = logging.getLogger(__name__)


def train(config: StageConfig, workdir: str | Path, bar_position: int = 0) -> None:
    """Runs a stage to its last step, resuming from the newest checkpoint in `workdir` if there is one.

    Args:
      bar_position: the terminal line of the progress bar, where several runs share a terminal.

    Raises:
      ConfigError, CheckpointError, NonFiniteLoss, SkippedTooMany: see where they are defined.
    """
    write_run_files(workdir, config_to_dict(config))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        _train(config, workdir, mesh, bar_position)


def _train(config: StageConfig, workdir: str | Path, mesh: Mesh, bar_position: int) -> None:
    model = abstract(lambda: VocoLlama(config.model, nnx.Rngs(0), config.dtype))
    check_rules(variables_of(model), config.train, config.freeze)
    rows, ways = config.batch_size // config.accumulate, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise ConfigError("batch_size", f"/ accumulate must be a multiple of data x fsdp = {ways} devices, got {rows}")
    teacher = _abstract_teacher(config)
    views: list[Visibility] = [config.visibility] if teacher is None else [config.visibility, "causal"]
    stream = BatchStream(config.model, config.data, config.batch_size, config.seed, *views)
    stream.tokenizer.save(Path(workdir) / "tokenizer")
    optimizer = make_optimizer(config.optimizer, config.steps)
    checkpoints = Checkpoints(workdir, config.checkpoint)

    first_step = checkpoints.latest or 0
    if first_step:
        state, progress = _restored_state(config, model, teacher, optimizer, mesh, checkpoints, first_step)
        stream.set_state(progress["data"])
        LOG.info("%s: resumes behind step %d", workdir, first_step)
    else:
        state = _initial_state(config, model, teacher, optimizer, mesh)

    # The new state keeps the old one's shardings, so that nothing is compiled twice and every donated buffer is used.
    kept = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(make_step(model, teacher, optimizer, config), donate_argnums=0, out_shardings=(kept, None))

    def save(number: int, state: TrainState) -> None:
        parameters = dict(sorted({**state.trained, **state.frozen}.items()))
        checkpoints.save(number, parameters, state.optimizer, {"data": stream.get_state()})

    try:
        loop.run(
            loop.LoopConfig(config.name, config.steps, config.log_every, bar_position), workdir, state, first_step,
            lambda state, batch: step(state, shard_batch(batch, mesh)), stream, checkpoints, save, stream.tally.scalars,
        )
    finally:
        checkpoints.close()


def _abstract_teacher(config: StageConfig) -> VocoLlama | None:
    if not config.distill.teacher:
        return None
    saved = run_config(config.distill.teacher).get("model")
    if saved != config_to_dict(config.model):
        raise ConfigError("distill.teacher", f"must be a run of the same model, {config.distill.teacher} is of another")
    return abstract(lambda: VocoLlama(config.model, nnx.Rngs(0), config.dtype))


def _wanted(config: StageConfig, model: VocoLlama, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every parameter: fp32 masters of what trains, the rest as `frozen_dtype`."""
    shardings, wanted = parameter_shardings(model, mesh), {}
    for name, variable in variables_of(model).items():
        dtype = jnp.float32 if matches(name, config.train) else config.frozen_dtype
        wanted[name] = jax.ShapeDtypeStruct(variable.shape, dtype, sharding=shardings[name])
    return wanted


def _initial_state(
    config: StageConfig,
    model: VocoLlama,
    teacher: VocoLlama | None,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The state at step 0, every array born with its sharding."""
    wanted = _wanted(config, model, mesh)
    taken = {n: w for n, w in wanted.items() if config.init_from and not matches(n, config.init_new)}
    new = {n: w for n, w in wanted.items() if n not in taken}
    for pattern in config.init_new:
        if not any(matches(name, (pattern,)) for name in wanted):
            raise ConfigError("init_new", f"has the regex {pattern!r}, which matches no parameter")

    def random_parameters(key: jax.Array) -> Parameters:
        created = parameters_of(VocoLlama(config.model, nnx.Rngs(key), config.dtype))
        return {name: created[name].astype(leaf.dtype) for name, leaf in new.items()}

    shardings = {name: leaf.sharding for name, leaf in new.items()}
    parameters = jax.jit(random_parameters, out_shardings=shardings)(jax.random.key(config.seed)) if new else {}
    if taken:
        parameters |= load_parameters(config.init_from, taken)
        LOG.info("%d of %d parameters come from %s", len(taken), len(wanted), config.init_from)
    trained = {name: parameters[name] for name in wanted if matches(name, config.train)}
    moments = _optimizer_shapes(optimizer, trained, mesh)
    make_moments = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, moments))
    return TrainState(
        step=jax.device_put(jnp.int32(0), replicated(mesh)),
        trained=trained,
        frozen={name: parameters[name] for name in wanted if name not in trained},
        optimizer=make_moments(trained),
        teacher=_teacher_parameters(config, teacher, mesh),
    )


def _restored_state(
    config: StageConfig,
    model: VocoLlama,
    teacher: VocoLlama | None,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    checkpoints: Checkpoints,
    step: int,
) -> tuple[TrainState, dict[str, Any]]:
    """The state of a checkpoint, read straight into its shardings, and what else the checkpoint says."""
    wanted = _wanted(config, model, mesh)
    trained = {name: leaf for name, leaf in wanted.items() if matches(name, config.train)}
    parameters, moments, progress = checkpoints.restore(step, wanted, _optimizer_shapes(optimizer, trained, mesh))
    state = TrainState(
        step=jax.device_put(jnp.int32(step), replicated(mesh)),
        trained={name: parameters[name] for name in trained},
        frozen={name: parameters[name] for name in wanted if name not in trained},
        optimizer=moments,
        teacher=_teacher_parameters(config, teacher, mesh),
    )
    return state, progress


def _teacher_parameters(config: StageConfig, teacher: VocoLlama | None, mesh: Mesh) -> Parameters:
    if teacher is None:
        return {}
    frozen = dataclasses.replace(config, train=("nothing",))
    return load_parameters(config.distill.teacher, _wanted(frozen, teacher, mesh))


def _optimizer_shapes(optimizer: optax.GradientTransformation, trained: Any, mesh: Mesh) -> Any:
    """The optimizer state's abstract arrays, moments sharded like the parameters they belong to."""
    shapes = jax.eval_shape(optimizer.init, trained)
    with_sharding = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return optax.tree_map_params(
        optimizer, lambda leaf, parameter: with_sharding(leaf, parameter.sharding), shapes, trained,
        transform_non_params=lambda leaf: with_sharding(leaf, replicated(mesh)),
    )
