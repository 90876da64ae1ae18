"""The checkpoints of a run (Orbax): which are written and kept, and what is restored.

    WORKDIR/checkpoints/STEP/parameters   what trains, a flat dict by path name
                             optimizer    what training alone needs
                             progress     JSON: the data stream's state, the config's digest, checksums of all of it
    WORKDIR/frozen                        the other parameters, written once
    WORKDIR/damaged/STEP                  checkpoints that could not be read, moved out of the way

Directories appear under their names when they are whole. Nothing in a step is random; what is (the first parameters,
the order of the data) follows from the seed in the config, so that there is no other state to save.
"""

import errno
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.typing import DTypeLike
from orbax.checkpoint import checkpoint_managers as keep

from vocojax.config import ConfigError, LoraConfig, ModelConfig, build
from vocojax.models.lora import merge_factors, with_factors
from vocojax.models.parameters import Parameters, abstract, variables_of, with_parameters
from vocojax.models.voco import VocoLlama
from vocojax.training import distributed
from vocojax.training.checksums import checksums
from vocojax.training.config import CheckpointConfig
from vocojax.training.run_files import (
    CheckpointError,
    is_remote,
    run_config,
    run_path,
    write_atomically,
    write_run_files,
)
from vocojax.training.step import TrainState

__all__ = ["CheckpointError", "Checkpoints", "load_model", "load_parameters", "run_config", "write_atomically",
           "write_run_files"]

LOG = logging.getLogger(__name__)
_ITEMS = {"parameters": ocp.PyTreeCheckpointHandler, "optimizer": ocp.PyTreeCheckpointHandler,
          "progress": ocp.JsonCheckpointHandler}


class Checkpoints:
    """Saves and restores the checkpoints of one run, asynchronously and atomically. All processes call it alike.

    Args:
      workdir: the run's directory.
      config: when to write and what to keep.
      config_digest: of the run's config; a checkpoint of another config is not restored.
      clock: seconds, for checkpoints by time.
    """

    def __init__(
        self,
        workdir: str | Path,
        config: CheckpointConfig,
        config_digest: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config, self._digest, self._clock = config, config_digest, clock
        self._workdir = run_path(workdir)
        self._frozen_checksums: dict[str, int] | None = None
        self._saved_at = clock()
        policies: list[Any] = [keep.LatestN(config.keep)]
        if config.keep_every:
            policies.append(keep.EveryNSteps(config.keep_every))
        metric = lambda values: values[config.best_metric]
        if config.keep_best:
            policies.append(keep.BestN(get_metric_fn=metric, reverse=config.best_is == "lowest", n=config.keep_best,
                                       keep_checkpoints_without_metrics=False))
        self._manager = _open(
            self._workdir, cleanup_tmp_directories=True, preservation_policy=keep.AnyPreservationPolicy(policies),
            best_fn=metric if config.keep_best else None,
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written behind `step` optimizer steps."""
        return any(every and step % every == 0 for every in (self._config.every, self._config.keep_every))

    def overdue(self) -> bool:
        """Whether the last checkpoint is older than the config allows; process 0's clock decides for all."""
        late = self._config.minutes > 0 and self._clock() - self._saved_at >= 60 * self._config.minutes
        return self._config.minutes > 0 and distributed.from_first("checkpoint by time", late)

    def save(
        self, step: int, state: TrainState, progress: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Begins to write a checkpoint behind `step` optimizer steps; one that exists is left as it is.

        Returns when the arrays are copied, so that the next step may donate them.

        Args:
          progress: JSON-able, on process 0.
          metrics: what `keep_best` chooses by.

        Raises:
          CheckpointError: this one or the one before could not be written; earlier ones are intact.
        """
        self._saved_at = self._clock()
        if step == self.latest:
            return
        try:
            with jax.transfer_guard("allow"):
                self._save(step, state, progress, metrics)
        except (OSError, ValueError, RuntimeError) as error:
            raise self.failure(error) from error

    def _save(
        self, step: int, state: TrainState, progress: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> None:
        self._save_frozen(state.frozen)
        sums = checksums({"parameters": state.trained, "optimizer": state.optimizer})
        about = {**progress, "config": self._digest, "checksums": sums | (self._frozen_checksums or {})}
        about["sha256"] = _sha256(about)
        best = {} if metrics is None or not self._config.keep_best else {
            self._config.best_metric: float(metrics[self._config.best_metric])}
        self._manager.save(
            step, force=True, metrics=best or None,
            args=ocp.args.Composite(
                parameters=ocp.args.PyTreeSave(state.trained),
                optimizer=ocp.args.PyTreeSave(state.optimizer),
                progress=ocp.args.JsonSave(about),
            ),
        )

    def _save_frozen(self, frozen: Parameters) -> None:
        if self._frozen_checksums is not None:
            return
        if frozen:  # one that is there is of a start that never came to a checkpoint
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                checkpointer.save(self._workdir / "frozen", args=ocp.args.PyTreeSave(frozen), force=True)
        self._frozen_checksums = checksums({"frozen": frozen})

    def restore(self, wanted: TrainState) -> tuple[int, TrainState, dict[str, Any]] | None:
        """(step, state without teacher, progress) of the newest checkpoint that is sound, None if there is none at all.

        Newer ones that can't be read, or whose arrays are not those that were saved, are moved to WORKDIR/damaged.

        Args:
          wanted: shapes, dtypes and shardings of the state, on any mesh and number of processes.

        Raises:
          CheckpointError: there are checkpoints, but none can be restored; or they are of another config.
        """
        problems: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            problem, restored = self._restored(step, wanted)
            if restored is None:
                problems[step] = problem
                LOG.error("%s: THE CHECKPOINT OF STEP %d IS DAMAGED: %s", self._workdir, step, problem)
                continue
            self._move_aside(list(problems))
            state, progress = restored
            self._saved_at = self._clock()
            return step, state, progress
        if problems:
            listed = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            raise CheckpointError(f"{self._workdir}: no checkpoint can be restored ({listed}). "
                                  "All are left as they are")
        return None

    def _restored(self, step: int, wanted: TrainState) -> tuple[str, tuple[TrainState, dict[str, Any]] | None]:
        """("", what was restored) or (what is wrong, None), the same on all processes."""
        directory, problem = self._workdir / "checkpoints" / str(step), ""
        try:
            # Read by the handlers themselves: a process that fails must not leave the others in a barrier of Orbax's.
            progress = json.loads((directory / "progress" / "metadata").read_text())
            if progress["sha256"] != _sha256(progress):
                raise CheckpointError("progress is not what was saved")
            trained = _read(directory / "parameters", wanted.trained)
            optimizer = _read(directory / "optimizer", wanted.optimizer)
            frozen = _read(self._workdir / "frozen", wanted.frozen) if wanted.frozen else {}
        except Exception as error:  # whatever a damaged file makes of Orbax and TensorStore
            problem = f"{type(error).__name__}: {_first_line(error)}"
        if problem := next(filter(None, distributed.from_all("restore", problem)), ""):
            return problem, None
        if progress["config"] != self._digest:
            raise CheckpointError(f"{directory} was written with another config: use that one, or another --workdir")
        self._frozen_checksums = checksums({"frozen": frozen})
        sums = checksums({"parameters": trained, "optimizer": optimizer}) | self._frozen_checksums
        if changed := [name for name, value in progress["checksums"].items() if sums.get(name) != value]:
            return f"not what was saved (checksum): {', '.join(changed[:5])}{' ...' * (len(changed) > 5)}", None
        number: Any = jax.device_put(jnp.int32(step), wanted.step.sharding)
        return "", (TrainState(number, trained, frozen, optimizer, {}), progress)

    def _move_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if distributed.is_first():
            (self._workdir / "damaged").mkdir(exist_ok=True)
            for step in steps:
                target = self._workdir / "damaged" / f"{step}-{int(time.time())}"
                (self._workdir / "checkpoints" / str(step)).rename(target)
                LOG.error("%s: moved to %s; the run goes on from the one before", self._workdir, target)
        distributed.from_first("damaged", True)
        self._manager.reload()

    def check(self) -> None:
        """Raises `CheckpointError` if a checkpoint that was begun could not be written."""
        try:
            self._manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as error:
            raise self.failure(error) from error

    def wait(self) -> None:
        """Returns when everything saved is on disk; `CheckpointError` if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self.failure(error) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError:
            if kind is None:
                raise
            LOG.exception("while another error ended the run")

    def close(self) -> None:
        """Waits and releases the writer's threads."""
        try:
            self._manager.close()
        except (OSError, ValueError, RuntimeError) as error:
            raise self.failure(error) from error

    def failure(self, error: Exception) -> CheckpointError:
        """What to tell of a failed write of a checkpoint or another of the run's files."""
        if isinstance(error, CheckpointError):
            return error
        steps = sorted(ocp.utils.checkpoint_steps(self._workdir / "checkpoints"))
        intact = f"those of steps {', '.join(map(str, steps))} are intact" if steps else "there is none"
        remedy = "the same command goes on from the newest"
        text = str(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
            sign in text for sign in ("No space left", "ENOSPC", "quota exceeded", "File too large"))
        if full:
            free = "" if is_remote(self._workdir) else (
                f" ({shutil.disk_usage(self._workdir).free / 2**20:,.0f} MiB are free)")
            return CheckpointError(f"{self._workdir}: THE DISK IS FULL{free}: a file of the run could not be written; "
                                   f"checkpoints: {intact}. Make room; {remedy}")
        return CheckpointError(f"{self._workdir}: a checkpoint could not be written: {_first_line(error)}; "
                               f"earlier ones: {intact}; {remedy}")


def _sha256(progress: Mapping[str, Any]) -> str:
    """Of everything in a progress file but this."""
    rest = {name: value for name, value in progress.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:300] if lines else ""


def _open(workdir: epath.Path, **options: Any) -> ocp.CheckpointManager:
    """Orbax's manager of a run's checkpoints."""
    handlers = {name: handler() for name, handler in _ITEMS.items()}
    return ocp.CheckpointManager(
        workdir / "checkpoints", item_names=tuple(handlers), item_handlers=handlers,
        options=ocp.CheckpointManagerOptions(**options),
    )


def _read(directory: epath.Path, wanted: Any) -> Any:
    """Arrays in the shapes, dtypes and shardings asked for; a dict may leave out some that are there."""
    return ocp.PyTreeCheckpointHandler().restore(directory, args=ocp.args.PyTreeRestore(
        item=wanted, partial_restore=isinstance(wanted, dict),
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
    ))


def _saved_leaves(directory: epath.Path) -> dict[str, Any]:
    """Name -> metadata with shape and dtype of every parameter in a directory."""
    metadata = ocp.PyTreeCheckpointHandler().metadata(directory)
    return dict(getattr(metadata, "tree", metadata))


def parameter_directories(workdir: str | Path) -> list[epath.Path]:
    """Where the parameters of a run's newest checkpoint lie: each is in one of them.

    Raises:
      CheckpointError: there is no complete checkpoint.
    """
    path = run_path(workdir)
    steps = ocp.utils.checkpoint_steps(path / "checkpoints")
    if not steps:
        raise CheckpointError(f"{workdir} holds no checkpoint")
    own = path / "checkpoints" / str(max(steps)) / "parameters"
    return [own, path / "frozen"] if (path / "frozen").exists() else [own]


def load_parameters(workdir: str | Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Parameters of a run's newest checkpoint, in the shapes, dtypes and shardings asked for; those that LoRA adapted
    come merged with their factors.

    Raises:
      CheckpointError: no checkpoint, or parameters that are missing or shaped otherwise (all are named).
    """
    parts = [(directory, _saved_leaves(directory)) for directory in parameter_directories(workdir)]
    saved = {name: leaf for _, leaves in reversed(parts) for name, leaf in leaves.items()}
    problems = [f"{name} is missing" for name in wanted if name not in saved]
    problems += [f"{name} has shape {tuple(saved[name].shape)}, expected {leaf.shape}"
                 for name, leaf in wanted.items() if name in saved and tuple(saved[name].shape) != leaf.shape]
    if problems:
        raise CheckpointError(f"{parts[0][0].parent} does not fit the model: {'; '.join(problems)} "
                              "(init_new names what a stage does not take from it)")
    item = with_factors(wanted, saved)
    found: Parameters = {}
    for directory, leaves in parts:
        if here := {name: leaf for name, leaf in item.items() if name in leaves and name not in found}:
            found |= _read(directory, here)
    if item.keys() == wanted.keys():
        return {name: found[name] for name in wanted}
    return merge_factors(found, wanted, build(LoraConfig, run_config(workdir)["lora"], "lora").scale)


def load_model(workdir: str | Path, dtype: DTypeLike = jnp.float32) -> VocoLlama:
    """The model of a run's newest checkpoint; computes in and holds its parameters in `dtype`."""
    try:
        config = build(ModelConfig, run_config(workdir)["model"], "model")
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{workdir}/config.json is not a stage's config: {error}") from error
    model = abstract(lambda: VocoLlama(config, nnx.Rngs(0), dtype))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(variable.shape, dtype, sharding=sharding)
              for name, variable in variables_of(model).items()}
    return with_parameters(model, load_parameters(workdir, wanted))
