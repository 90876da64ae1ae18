"""A training stage from its config: model, data, optimizer, step and loop put together."""

import logging
from collections.abc import Callable, Mapping
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
    teacher = _abstract_teacher(config)
    views: list[Visibility] = [config.visibility] if teacher is None else [config.visibility, "causal"]
    stream = BatchStream(config.model, config.data, config.batch_size, config.seed, *views)
    stream.tokenizer.save(Path(workdir) / "tokenizer")
    optimizer = make_optimizer(config.optimizer, config.steps)
    checkpoints = Checkpoints(workdir, config.checkpoint)

    first_step = checkpoints.latest or 0
    state = _initial_state(config, model, teacher, optimizer, mesh, resumes=first_step > 0)
    if first_step:
        parameters, optimizer_state, progress = checkpoints.restore(
            first_step, {**state.trained, **state.frozen}, state.optimizer
        )
        state = state._replace(
            step=jax.device_put(jnp.int32(first_step), replicated(mesh)),
            trained={name: parameters[name] for name in state.trained},
            frozen={name: parameters[name] for name in state.frozen},
            optimizer=optimizer_state,
        )
        stream.set_state(progress["data"])
        LOG.info("%s: resumes behind step %d", workdir, first_step)

    step = jax.jit(make_step(model, teacher, optimizer, config), donate_argnums=0)

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
    if config.distill is None:
        return None
    saved = run_config(config.distill.teacher)["model"]
    if saved != config_to_dict(config.model):
        raise ConfigError("distill.teacher", f"must be a run of the same model, {config.distill.teacher} is of another")
    return abstract(lambda: VocoLlama(config.model, nnx.Rngs(0), config.dtype))


def _initial_state(
    config: StageConfig, model: VocoLlama, teacher: VocoLlama | None, optimizer: optax.GradientTransformation,
    mesh: Mesh, resumes: bool,
) -> TrainState:
    """The state at step 0, every array born with its sharding; a resumed run's is filled in afterwards."""
    shardings = parameter_shardings(model, mesh)
    trains = {name: matches(name, config.train) for name in shardings}
    dtypes = {name: jnp.dtype(jnp.float32 if trains[name] else config.frozen_dtype) for name in shardings}

    def wanted(names: Any, dtype_of: Callable[[str], Any]) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = variables_of(model)
        return {n: jax.ShapeDtypeStruct(shapes[n].shape, dtype_of(n), sharding=shardings[n]) for n in names}

    def random_parameters(key: jax.Array) -> Parameters:
        created = parameters_of(VocoLlama(config.model, nnx.Rngs(key), config.dtype))
        return {name: value.astype(dtypes[name]) for name, value in created.items()}

    parameters = jax.jit(random_parameters, out_shardings=shardings)(jax.random.key(config.seed))
    if config.init_from and not resumes:
        taken = [name for name in shardings if not matches(name, config.init_new)]
        parameters |= load_parameters(config.init_from, wanted(taken, dtypes.__getitem__))
        LOG.info("%d of %d parameters come from %s", len(taken), len(shardings), config.init_from)
    trained = {name: value for name, value in parameters.items() if trains[name]}
    frozen = {name: value for name, value in parameters.items() if not trains[name]}
    guide: Mapping[str, jax.Array] = {}
    if teacher is not None and config.distill is not None:
        guide = load_parameters(config.distill.teacher, wanted(shardings, lambda _: jnp.dtype(config.frozen_dtype)))
    return TrainState(
        step=jax.device_put(jnp.int32(0), replicated(mesh)),
        trained=trained,
        frozen=frozen,
        optimizer=_initial_optimizer_state(optimizer, trained, mesh),
        teacher=dict(guide),
    )


def _initial_optimizer_state(optimizer: optax.GradientTransformation, trained: Parameters, mesh: Mesh) -> Any:
    """The optimizer's state at step 0, its moments sharded like the parameters they belong to."""
    shapes = jax.eval_shape(optimizer.init, trained)
    shardings = optax.tree_map_params(
        optimizer, lambda _, parameter: parameter.sharding, shapes, trained,
        transform_non_params=lambda _: replicated(mesh),
    )
    return jax.jit(optimizer.init, out_shardings=shardings)(trained)
