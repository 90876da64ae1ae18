"""Runs a training stage from its config: puts model, data, optimizer, step and loop together."""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from vocojax.config import ConfigError, ModelConfig, VisionConfig, build, config_to_dict, differing_keys
from vocojax.data.loader import BatchStream, merge_states
from vocojax.files import write_files
from vocojax.hub import SCHEME
from vocojax.models.lora import is_factor
from vocojax.models.parameters import Parameters, parameters_of
from vocojax.parallel import processes
from vocojax.parallel.mesh import BATCH, make_mesh
from vocojax.parallel.shardings import row_share
from vocojax.pretrained.loading import load_parameters
from vocojax.pretrained.source import open_source
from vocojax.runs.card import write_card_sums
from vocojax.runs.directory import is_run, run_config, run_path, write_run_files
from vocojax.runs.owner import owned
from vocojax.runs.selection import refuse_choice
from vocojax.training import loop, plan, start
from vocojax.training.checkpoints import Checkpoints
from vocojax.training.compilation_cache import programs_kept_in
from vocojax.training.config import StageConfig
from vocojax.training.flops import Composition, StepFlops
from vocojax.training.optimizer import matches
from vocojax.training.parameter_table import report_parameters
from vocojax.training.program import Program, make_model, make_program
from vocojax.training.scoring import OpenScorer, Scoring
from vocojax.training.step import TrainState
from vocojax.training.validation import Validation

LOG = logging.getLogger(__name__)
# Sizes of the vocabulary differ between layouts of one model; loading compares the shapes.
SHAPES = ("decoder.vocab_size", "decoder.vocab_padding")


def train(
    config: StageConfig, workdir: str | Path, bar_position: int = 0, open_scorer: OpenScorer | None = None,
    extend: bool = False,
) -> None:
    """Runs a stage to its last step; resumes from the newest sound checkpoint in `workdir` if there is one.

    All processes of a run (`cluster.initialize`) call it alike.

    Args:
      config: of the stage.
      workdir: a local path, or any that `etils.epath` knows; with several processes one that all see.
      bar_position: the terminal line of the progress bar, where several runs share a terminal.
      open_scorer: opens what asks `validation.benchmarks` and `validation.prompts`:
        `vocojax.evaluation.training_scores.open_scorer`.
      extend: whether a finished run in `workdir` may get more steps. The schedule is that of all steps together.

    Raises:
      ConfigError: the config does not fit the devices, the data or `init_from`.
      CheckpointError: a checkpoint can't be read or written, or `workdir` holds a run with another config.
      RunInUse: another run trains in `workdir`.
      NonFiniteLoss: the loss became NaN or infinite.
      SkippedTooMany: too many records can't be read.
      Preempted: the run was asked to stop, and is saved.
    """
    if str(workdir).startswith(SCHEME):
        raise ConfigError("workdir", f"can't be on the hub, which is only read, got {workdir}: name another place")
    refuse_choice(workdir)
    with owned(workdir):
        _train_as_owner(config, workdir, bar_position, open_scorer, extend)


def _train_as_owner(
    config: StageConfig, workdir: str | Path, bar_position: int, open_scorer: OpenScorer | None, extend: bool
) -> None:
    write_run_files(workdir, config, extend)
    mesh = make_mesh(config.mesh)
    with (
        jax.enable_x64(False),  # dtypes are the config's, whatever JAX_ENABLE_X64 says
        programs_kept_in(config.run.compilation_cache, workdir),
        jax.set_mesh(mesh),
        Checkpoints(workdir, config.checkpoint, config, extend) as checkpoints,
    ):
        _train(config, workdir, mesh, checkpoints, bar_position, open_scorer)


def _train(
    config: StageConfig, workdir: str | Path, mesh: Mesh, checkpoints: Checkpoints, bar_position: int,
    open_scorer: OpenScorer | None,
) -> None:
    program = _checked_program(config, mesh, is_new=checkpoints.latest is None)
    index, count = row_share(NamedSharding(mesh, BATCH), config.batch_size)
    with contextlib.closing(_open_stream(config, index, count)) as stream:
        validate = Validation(config, program, index, count) if config.validation.every else None
        score = _open_scoring(config, program, stream, open_scorer)
        first_step, useful_seconds = 0, 0.0
        restored = checkpoints.restore(program.abstract_state)
        if restored is not None:
            first_step, state, progress = restored
            stream.set_state(progress["data"])
            useful_seconds = progress["useful_seconds"]
            LOG.info("%s: resumes after step %d", workdir, first_step)
            if longer := start.extension(config, progress["config"], first_step):
                LOG.info("%s: %s", workdir, longer)
        if processes.is_first():  # only now: a resumed run's tokenizer has been compared with the saved one
            write_files(run_path(workdir) / "tokenizer", stream.tokenizer.save)
            write_card_sums(run_path(workdir))
        batches: loop.Stream = stream
        if first_step < config.steps:
            batches = opened = start.open_first(stream)
            if processes.is_first():
                LOG.info("\n%s", start.banner(config, workdir, program, opened, first_step, count))
                start.warn_of_unknown_words(stream)
        if restored is None:
            state = _initial_state(config, program)
            parameters = program.abstract_parameters
            origins = {name: "random" if _is_new(config, name) else config.init_from for name in parameters}
            report_parameters(workdir, parameters, program.multipliers, origins)
        else:
            state = state._replace(teacher=_teacher_parameters(config, program))
            checkpoints.require_teacher(state.teacher, progress, config.distill.teacher)
        flops, slots = StepFlops(config.model, program.abstract_state), config.batch_size * config.data.row_length
        composition = Composition(config.model.unit_tokens)

        def place(batch: Mapping[str, np.ndarray]) -> Mapping[str, jax.Array]:
            composition.see(batch)
            return plan.place(batch, config, mesh, index, count)

        def scalars(sums: Mapping[str, float], seconds: float) -> dict[str, float]:
            utilisation = composition.utilisation(flops, sums["tokens"], sums["targets"], seconds)
            steps_share = {"fill_ratio": sums["tokens"] / (slots * sums["steps"])}
            return {**steps_share, **({} if utilisation is None else {"mfu": utilisation}), **stream.tally.scalars()}

        task = loop.Task(program.step, batches, place, merge_states, scalars)
        if validate is not None:
            task = dataclasses.replace(task, validate=validate)
        if score is not None:
            task = dataclasses.replace(task, score=score)
        shown = loop.LoopConfig(config.name, config.steps, config.log_every, bar_position, config.run,
                                config.validation.every, config.validation.ask_every)
        loop.run(shown, workdir, task, state, first_step, checkpoints, useful_seconds)


def dry_run(
    config: StageConfig, workdir: str | Path, open_scorer: OpenScorer | None = None, extend: bool = False
) -> str:
    """Does what a start does before it compiles anything, and returns what the start would do; '' but on process 0.

    All processes of a run call it alike. The state is abstract, the data is opened and one batch is made. Nothing is
    written to `workdir`.

    Args:
      config: of the stage.
      workdir: where the run would be.
      open_scorer: see `train`.
      extend: see `train`.

    Raises:
      ConfigError: as `train`.
      SkippedTooMany: too many records can't be read.
      CheckpointError: `workdir` holds a run with another config.
    """
    first_step, config = start.newest_step(config, workdir, extend), start.without_workers(config)
    mesh = make_mesh(config.mesh)
    with jax.enable_x64(False), jax.set_mesh(mesh):
        program = _checked_program(config, mesh, is_new=first_step == 0)
        index, count = row_share(NamedSharding(mesh, BATCH), config.batch_size)
        with contextlib.closing(_open_stream(config, index, count)) as stream:
            if config.validation.every:
                Validation(config, program, index, count)
            _open_scoring(config, program, stream, open_scorer)
            opened = start.open_first(stream)
            if not processes.is_first():
                return ""
            start.warn_of_unknown_words(stream)
            return start.banner(config, workdir, program, opened, first_step, count)


def _checked_program(config: StageConfig, mesh: Mesh, is_new: bool) -> Program:
    """Returns the stage's program, after a look at the weights that a new run starts from; nothing is compiled."""
    program = make_program(config, mesh)
    _check_teacher(config)
    start.check_new(config, program)
    if config.init_from and is_new:
        _saved_config(config.init_from)
    return program


def _open_stream(config: StageConfig, process_index: int, process_count: int) -> BatchStream:
    return BatchStream(
        config.model, config.data, config.batch_size, config.seed, *plan.views(config), process_index=process_index,
        process_count=process_count, plan=config.plan,
    )


def _open_scoring(
    config: StageConfig, program: Program, stream: BatchStream, open_scorer: OpenScorer | None
) -> Scoring | None:
    """Returns what asks benchmarks and prompts while the run trains; None if nothing is asked."""
    if not config.validation.ask_every:
        return None
    if open_scorer is None:
        raise ConfigError("validation.ask_every", "needs who asks: use `vocojax train`, or call train(..., open_scorer="
                          "vocojax.evaluation.training_scores.open_scorer)")
    return Scoring(program, open_scorer(config, stream.tokenizer))


def _check_teacher(config: StageConfig) -> None:
    if not config.distill.teacher:
        return
    teacher = _saved_config(config.distill.teacher)
    mine = {part: values for part, values in config_to_dict(config.teacher_model).items() if part in teacher}
    if odd := [key for key in differing_keys(teacher, mine) if key not in SHAPES]:
        raise ConfigError("distill.teacher", f"must be of the same model, but {config.distill.teacher} differs in "
                          f"{', '.join(odd)}")


def _initial_state(config: StageConfig, program: Program) -> TrainState:
    """Returns the state at step 0; every array is made with its sharding."""
    wanted, abstract_state = program.abstract_parameters, program.abstract_state
    taken = {n: w for n, w in wanted.items() if not _is_new(config, n)}
    new = {n: w for n, w in wanted.items() if n not in taken}
    def random_parameters(key: jax.Array) -> Parameters:
        created = parameters_of(make_model(config, nnx.Rngs(key)))
        return {name: created[name].astype(leaf.dtype) for name, leaf in new.items()}

    shardings = {name: leaf.sharding for name, leaf in new.items()}
    parameters = jax.jit(random_parameters, out_shardings=shardings)(jax.random.key(config.seed)) if new else {}
    if taken:
        parameters |= load_parameters(config.init_from, taken)
        _warn_of_differences(config)
    if idle := [name for name in abstract_state.frozen if name in new]:
        LOG.warning("%d parameters are random and frozen, so they never learn anything (%s ...): set init_from, or "
                    "train them by learning_rates", len(idle), idle[0])
    trained = {name: parameters[name] for name in abstract_state.trained}
    moments = jax.tree.map(lambda leaf: leaf.sharding, abstract_state.optimizer)
    return TrainState(
        step=jax.device_put(jnp.int32(0), abstract_state.step.sharding),
        trained=trained,
        frozen={name: parameters[name] for name in abstract_state.frozen},
        optimizer=jax.jit(program.optimizer.init, out_shardings=moments)(trained),
        teacher=_teacher_parameters(config, program),
        ema=jax.tree.map(jnp.copy, trained) if config.optimizer.ema else {},
    )


def _is_new(config: StageConfig, name: str) -> bool:
    """Returns whether a parameter starts from random values, not from `init_from`."""
    return not config.init_from or matches(name, config.init_new) or is_factor(name)


def _warn_of_differences(config: StageConfig) -> None:
    """Warns where `init_from`'s model differs from the stage's in what no shape tells."""
    saved, mine = _saved_config(config.init_from), config_to_dict(config.model)
    for part in ("vision", "decoder"):
        for key in differing_keys(saved[part], mine[part], f"{part}.") if part in saved else ():
            if key in SHAPES:
                continue
            LOG.warning("model.%s is not what %s, where the parameters come from, was made with", key, config.init_from)


def _saved_config(directory: str) -> dict[str, Any]:
    """Returns the model's config in a directory of any layout; of a vision tower or a decoder alone, its part."""
    if is_run(directory):  # a run needs no tokenizer for this
        values = run_config(directory)
        if "vision" in values:
            return {"vision": config_to_dict(build(VisionConfig, values["vision"], "vision"))}
        return config_to_dict(build(ModelConfig, values["model"], "model"))
    source = open_source(directory)
    saved = config_to_dict(source.config)
    return {"decoder": saved["decoder"]} if source.decoder_only else saved


def _teacher_parameters(config: StageConfig, program: Program) -> Parameters:
    wanted: Any = program.abstract_state.teacher
    return load_parameters(config.distill.teacher, wanted) if wanted else {}
