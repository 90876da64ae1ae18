"""A training stage from its config: model, data, optimizer, step and loop put together."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vocojax.config import ConfigError, ModelConfig, build
from vocojax.data.loader import BatchStream
from vocojax.models.lora import is_factor
from vocojax.models.parameters import Parameters, parameters_of
from vocojax.training import loop
from vocojax.training.checkpoints import Checkpoints, load_parameters, run_config, write_run_files
from vocojax.training.config import StageConfig, config_to_dict, differing_keys
from vocojax.training.optimizer import matches
from vocojax.training.program import Program, make_model, make_program, views
from vocojax.training.sharding import make_mesh, shard_batch
from vocojax.training.step import TrainState

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
    program = make_program(config, mesh)
    _check_teacher(config)
    stream = BatchStream(config.model, config.data, config.batch_size, config.seed, *views(config))
    stream.tokenizer.save(Path(workdir) / "tokenizer")
    checkpoints = Checkpoints(workdir, config.checkpoint)

    first_step = checkpoints.latest or 0
    if first_step:
        state, progress = _restored_state(config, program, checkpoints, first_step)
        stream.set_state(progress["data"])
        LOG.info("%s: resumes behind step %d", workdir, first_step)
    else:
        state = _initial_state(config, program)

    def save(number: int, state: TrainState) -> None:
        parameters = dict(sorted({**state.trained, **state.frozen}.items()))
        checkpoints.save(number, parameters, state.optimizer, {"data": stream.get_state()})

    try:
        loop.run(
            loop.LoopConfig(config.name, config.steps, config.log_every, bar_position), workdir, state, first_step,
            lambda state, batch: program.step(state, shard_batch(batch, mesh)), stream, checkpoints, save,
            stream.tally.scalars,
        )
    finally:
        checkpoints.close()


def _check_teacher(config: StageConfig) -> None:
    if not config.distill.teacher:
        return
    saved = run_config(config.distill.teacher).get("model", {})
    if build(ModelConfig, saved, "distill.teacher: model") != config.model:
        raise ConfigError("distill.teacher", f"must be a run of the same model, {config.distill.teacher} is of another")


def _initial_state(config: StageConfig, program: Program) -> TrainState:
    """The state at step 0, every array born with its sharding."""
    wanted, abstract_state = program.abstract_parameters, program.abstract_state
    is_new = lambda name: not config.init_from or matches(name, config.init_new) or is_factor(name)
    taken = {n: w for n, w in wanted.items() if not is_new(n)}
    new = {n: w for n, w in wanted.items() if n not in taken}
    for pattern in config.init_new:
        if not any(matches(name, (pattern,)) for name in wanted):
            raise ConfigError("init_new", f"has the regex {pattern!r}, which matches no parameter")

    def random_parameters(key: jax.Array) -> Parameters:
        created = parameters_of(make_model(config, nnx.Rngs(key)))
        return {name: created[name].astype(leaf.dtype) for name, leaf in new.items()}

    shardings = {name: leaf.sharding for name, leaf in new.items()}
    parameters = jax.jit(random_parameters, out_shardings=shardings)(jax.random.key(config.seed)) if new else {}
    if taken:
        parameters |= load_parameters(config.init_from, taken)
        _log_origin(config, taken, new)
    trained = {name: parameters[name] for name in abstract_state.trained}
    moments = jax.tree.map(lambda leaf: leaf.sharding, abstract_state.optimizer)
    return TrainState(
        step=jax.device_put(jnp.int32(0), abstract_state.step.sharding),
        trained=trained,
        frozen={name: parameters[name] for name in abstract_state.frozen},
        optimizer=jax.jit(program.optimizer.init, out_shardings=moments)(trained),
        teacher=_teacher_parameters(config, program),
    )


def _log_origin(config: StageConfig, taken: Iterable[str], new: Iterable[str]) -> None:
    """Says of every parameter whether it is new, and warns where the two models differ in what no shape tells."""
    LOG.info("from %s: %s", config.init_from, ", ".join(taken))
    LOG.info("new: %s", ", ".join(new) or "nothing")
    saved = config_to_dict(build(ModelConfig, run_config(config.init_from)["model"], "model"))
    mine = config_to_dict(config.model)
    for key in (k for part in ("vision", "decoder") for k in differing_keys(saved[part], mine[part], f"model.{part}.")):
        LOG.warning("%s is not what %s, where the parameters come from, was made with", key, config.init_from)


def _restored_state(
    config: StageConfig, program: Program, checkpoints: Checkpoints, step: int
) -> tuple[TrainState, dict[str, Any]]:
    """The state of a checkpoint, read straight into its shardings, and what else the checkpoint says."""
    abstract_state = program.abstract_state
    parameters, moments, progress = checkpoints.restore(step, program.abstract_parameters, abstract_state.optimizer)
    state = TrainState(
        step=jax.device_put(jnp.int32(step), abstract_state.step.sharding),
        trained={name: parameters[name] for name in abstract_state.trained},
        frozen={name: parameters[name] for name in abstract_state.frozen},
        optimizer=moments,
        teacher=_teacher_parameters(config, program),
    )
    return state, progress


def _teacher_parameters(config: StageConfig, program: Program) -> Parameters:
    wanted: Any = program.abstract_state.teacher
    return load_parameters(config.distill.teacher, wanted) if wanted else {}
