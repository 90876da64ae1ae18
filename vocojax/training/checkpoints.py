"""The checkpoints of a run (Orbax): how they are written, which are kept, and how they are restored.

    WORKDIR/checkpoints/STEP/parameters   what trains, a flat dict by path name
                             optimizer    what only training needs
                             ema          averages of `parameters`, with `optimizer.ema`: what readers of the run get
                             progress     JSON: the data stream's state, the run's config, checksums of all of it
    WORKDIR/frozen                        the other parameters, written once
    WORKDIR/damaged/STEP                  checkpoints that could not be read, moved out of the way

Directories appear under their names when they are whole. Nothing in a step is random. The first parameters and the
order of the data are; they follow from the seed in the config, so that there is no other state to save.
"""

import errno
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as keep

from vocojax.files import is_remote, parse_json
from vocojax.models.parameters import Parameters
from vocojax.parallel import processes
from vocojax.runs.checkpoint_files import damaged, described, first_line, not_saved, read_arrays, read_progress, sha256
from vocojax.runs.checksums import checksums
from vocojax.runs.directory import CheckpointError, changed_keys, checkpoint_path, fixed_keys, put_aside
from vocojax.runs.earlier import upgraded_metrics
from vocojax.runs.owner import taken_over
from vocojax.training.config import CheckpointConfig
from vocojax.training.step import TrainState

__all__ = ["CheckpointError", "Checkpoints"]

LOG = logging.getLogger(__name__)
_ITEMS = {"parameters": ocp.PyTreeCheckpointHandler, "optimizer": ocp.PyTreeCheckpointHandler,
          "ema": ocp.PyTreeCheckpointHandler, "progress": ocp.JsonCheckpointHandler}


class Checkpoints:
    """The checkpoints of one run, which are written asynchronously and appear whole. All processes call it alike.

    Args:
      workdir: the run's directory.
      config: what to keep.
      run_config: the run's config, a dataclass; a checkpoint of another one is not restored.
      extend: whether checkpoints of a run of fewer steps are.

    Attributes:
      config: as given.
    """

    def __init__(self, workdir: str | Path, config: CheckpointConfig, run_config: Any = None, extend: bool = False):
        self.config, self._run_config, self._extend = config, run_config, extend
        self._teacher_digest: str | None = None
        self._workdir = checkpoint_path(workdir)
        self._was_read_back = False
        self._frozen_checksums: dict[str, int] | None = None
        policies: list[Any] = [keep.LatestN(config.keep)]
        if config.keep_every:
            policies.append(keep.EveryNSteps(config.keep_every))
        # A run that is resumed may be kept by another metric than before: what lacks it is the worst.
        worst = math.inf if config.best_is == "lowest" else -math.inf
        metric = lambda values: upgraded_metrics(values).get(config.best_metric, worst)
        if config.keep_best:
            policies.append(keep.BestN(get_metric_fn=metric, reverse=config.best_is == "lowest", n=config.keep_best,
                                       keep_checkpoints_without_metrics=False))
        self._put_unreadable_aside()
        self._manager = _open(
            self._workdir, cleanup_tmp_directories=True, preservation_policy=keep.AnyPreservationPolicy(policies),
            best_fn=metric if config.keep_best else None,
        )

    def _put_unreadable_aside(self) -> None:
        """Moves checkpoints away whose metadata or metrics Orbax could not read: it reads all when it opens them.

        Raises:
          CheckpointError: on all processes, if none would remain, or if the directory can't be read. Nothing is moved.
        """
        problem = ""
        if processes.is_first():
            try:
                problem = self._move_unreadable(self._workdir / "checkpoints")
            except Exception as error:  # object stores have exceptions of their own
                problem = (f"{self._workdir}: the checkpoints can't be read: {first_line(error)}. Run the same command "
                           "again")
        if problem := processes.from_first("unreadable", problem):
            raise CheckpointError(problem)

    def _move_unreadable(self, checkpoints: epath.Path) -> str:
        """Moves damaged checkpoints away; returns the problem if all are damaged, else ''."""
        found = sorted(checkpoints.iterdir()) if checkpoints.is_dir() else []
        steps = [path for path in found if path.name.isdecimal()]
        problems = {path: problem for path in steps if (problem := _unreadable(path))}
        if problems and len(problems) == len(steps):
            listed = "; ".join(f"step {path.name}: {problem}" for path, problem in problems.items())
            return f"{self._workdir}: no checkpoint can be restored ({listed}). All are left as they are"
        for path, problem in problems.items():
            LOG.error("%s: IS DAMAGED: %s; moved to %s", path, problem, put_aside(path))
        return ""

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, progress: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Begins to write a checkpoint after `step` optimizer steps; one that exists is left as it is.

        Returns when the arrays are copied, so that the next step may donate them. The first checkpoint of a start is
        waited for and read back: a run whose checkpoints can't be read must not train to its end.

        Args:
          step: the number of steps taken.
          state: after these steps.
          progress: where the data stand and how many seconds were useful; values that JSON can hold, on process 0.
          metrics: `keep_best` chooses by them; without its metric the checkpoint is not among the best.

        Raises:
          CheckpointError: this one or the one before could not be written; earlier ones are intact.
        """
        if step == self.latest:
            return
        if problem := processes.from_first("owner", self._taken_over()):
            raise CheckpointError(problem)
        try:
            with jax.transfer_guard("allow"):
                self._save(step, state, progress, metrics)
            if not self._was_read_back:
                self._read_back(step, state)
        except (OSError, ValueError, RuntimeError) as error:
            raise self.failure(error) from error

    def _taken_over(self) -> str:
        """Returns a problem if another run owns the directory. One that can't be asked must not stop a sound run."""
        try:
            return taken_over(self._workdir) if processes.is_first() else ""
        except Exception as error:  # object stores have exceptions of their own
            LOG.warning("%s: its owner can't be read: %s", self._workdir, first_line(error))
            return ""

    def _save(
        self, step: int, state: TrainState, progress: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> None:
        self._save_frozen(state.frozen)
        sums = checksums({"parameters": state.trained, "optimizer": state.optimizer, "ema": state.ema})
        about = {**progress, "config": fixed_keys(self._run_config), "teacher": self._digest_of(state.teacher),
                 "checksums": sums | (self._frozen_checksums or {})}
        about["sha256"] = sha256(about)
        name = self.config.best_metric
        best = {name: metrics[name]} if self.config.keep_best and metrics and name in metrics else {}
        averages = {"ema": ocp.args.PyTreeSave(state.ema)} if state.ema else {}
        self._manager.save(
            step, force=True, metrics=best or None,
            args=ocp.args.Composite(
                parameters=ocp.args.PyTreeSave(state.trained),
                optimizer=ocp.args.PyTreeSave(state.optimizer),
                progress=ocp.args.JsonSave(about),
                **averages,
            ),
        )

    def _save_frozen(self, frozen: Parameters) -> None:
        if self._frozen_checksums is not None:
            return
        directory = self._workdir / "frozen"
        if directory.exists() and self._manager.all_steps():
            raise CheckpointError(f"{directory}: belongs to the checkpoints that are there, which need it: "
                                  "use another --workdir")
        if frozen:  # a directory that exists was left by a start that never wrote a checkpoint
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                checkpointer.save(directory, args=ocp.args.PyTreeSave(frozen), force=True)
        self._frozen_checksums = checksums({"frozen": frozen})

    def _read_back(self, step: int, state: TrainState) -> None:
        """Waits for the first checkpoint of this start, and opens every array of it.

        Raises:
          CheckpointError: on all processes, if it is not complete.
        """
        self._manager.wait_until_finished()
        directory, problem = self._workdir / "checkpoints" / str(step), ""
        if processes.is_first():
            parts = [directory / "parameters", directory / "optimizer"]
            parts += [directory / "ema"] * bool(state.ema) + [self._workdir / "frozen"] * bool(state.frozen)
            try:
                read_progress(directory)
                for part in parts:
                    ocp.PyTreeCheckpointHandler().metadata(part)
            except Exception as error:  # Orbax and TensorStore raise many types
                problem = described(error)
        if problem := processes.from_first("read back", problem):
            raise CheckpointError(f"{directory}: was written, but can't be read back: {problem}. Use a --workdir on "
                                  "another file system")
        self._was_read_back = True

    def restore(self, wanted: TrainState) -> tuple[int, TrainState, dict[str, Any]] | None:
        """Restores the newest sound checkpoint; None if there is no checkpoint at all.

        Newer ones that can't be read, or whose arrays are not those that were saved, are moved to WORKDIR/damaged.

        Args:
          wanted: shapes, dtypes and shardings of the state, on any mesh and number of processes.

        Returns:
          (step, state without teacher, progress)

        Raises:
          CheckpointError: there are checkpoints, but none can be restored; or they are of another config; or the frozen
            parameters, which all of them need, are damaged.
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
            return step, state, progress
        if problems:
            listed = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            raise CheckpointError(f"{self._workdir}: no checkpoint can be restored ({listed}). "
                                  "All are left as they are")
        return None

    def _restored(self, step: int, wanted: TrainState) -> tuple[str, tuple[TrainState, dict[str, Any]] | None]:
        """Returns ("", the restored) or (the problem, None), the same on all processes."""
        directory, problem, unread = self._workdir / "checkpoints" / str(step), "", ""
        try:
            # Read by the handlers themselves: a process that fails must not leave the others in a barrier of Orbax's.
            progress = read_progress(directory)
            trained = read_arrays(directory / "parameters", wanted.trained)
            optimizer = read_arrays(directory / "optimizer", wanted.optimizer)
            ema = read_arrays(directory / "ema", wanted.ema) if wanted.ema else {}
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            problem = described(error)
        except OSError as error:  # which says nothing about the checkpoint
            unread = first_line(error)
        except Exception as error:  # whatever a damaged file makes of Orbax and TensorStore
            problem = described(error)
        if unread := next(filter(None, processes.from_all("read", unread)), ""):
            raise CheckpointError(f"{directory} can't be read: {unread}. Run the same command again")
        if problem := next(filter(None, processes.from_all("restore", problem)), ""):
            return problem, None
        if changed := changed_keys(progress["config"], self._run_config, self._extend):
            raise CheckpointError(f"{directory} was written with another config (differing: {', '.join(changed)}): "
                                  "use that one, or another --workdir")
        sums, saved = checksums({"parameters": trained, "optimizer": optimizer, "ema": ema}), progress["checksums"]
        if problem := not_saved(sums, saved, (name for name in saved if not name.startswith("frozen/"))):
            return problem, None
        frozen = self._restored_frozen(wanted.frozen, saved)
        number: Any = jax.device_put(jnp.int32(step), wanted.step.sharding)
        return "", (TrainState(number, trained, frozen, optimizer, {}, ema), progress)

    def _restored_frozen(self, wanted: Parameters, saved: Mapping[str, int]) -> Parameters:
        """Restores the parameters that all steps share; `CheckpointError` on all processes if they are damaged."""
        directory, problem = self._workdir / "frozen", ""
        frozen: Parameters = {}
        try:
            frozen = read_arrays(directory, wanted) if wanted else {}
        except Exception as error:  # whatever a damaged file makes of Orbax and TensorStore
            problem = described(error)
        problem = next(filter(None, processes.from_all("restore frozen", problem)), "")
        if not problem:
            self._frozen_checksums = checksums({"frozen": frozen})
            names = (name for name in saved if name.startswith("frozen/"))
            problem = not_saved(self._frozen_checksums, saved, names)
        if problem:
            raise damaged(directory, problem)
        return frozen

    def require_teacher(self, teacher: Parameters, progress: Mapping[str, Any], name: str) -> None:
        """Compares a teacher's parameters with those that the run had, wherever both were read from.

        Args:
          teacher: its parameters; {} for none.
          progress: from `restore`. Version 0.1 saved the teacher's directory, which is compared instead.
          name: directory of the teacher.

        Raises:
          CheckpointError: the run had another one.
        """
        if "teacher" in progress:
            is_same = progress["teacher"] == self._digest_of(teacher)
        else:
            saved = progress["config"]
            is_same = not isinstance(saved, Mapping) or saved.get("distill", {}).get("teacher", name) == name
        if not is_same:
            raise CheckpointError(f"{self._workdir}: distill.teacher {name!r} is not the teacher that this run has "
                                  "learned from (its parameters differ): name that one, or use another --workdir")

    def _digest_of(self, teacher: Parameters) -> str:
        """Returns a digest of a teacher's parameters, '' for none; they never change during a run."""
        if self._teacher_digest is None:
            self._teacher_digest = sha256(checksums({"teacher": teacher})) if teacher else ""
        return self._teacher_digest

    def _move_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if processes.is_first():
            for step in steps:
                target = put_aside(self._workdir / "checkpoints" / str(step))
                LOG.error("%s: moved to %s; the run resumes from the one before", self._workdir, target)
        processes.from_first("damaged", True)
        self._manager.reload()

    def check(self) -> None:
        """Raises `CheckpointError` if a checkpoint that was begun could not be written."""
        try:
            self._manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as error:
            raise self.failure(error) from error

    def wait(self) -> None:
        """Waits until everything saved is on disk; `CheckpointError` if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self.failure(error) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            LOG.error("while another error ended the run: %s", error)

    def close(self) -> None:
        """Waits, and releases the writer's threads."""
        try:
            self._manager.close()
        except (OSError, ValueError, RuntimeError) as error:
            raise self.failure(error) from error

    def failure(self, error: Exception) -> CheckpointError:
        """Returns the error for a failed write of a checkpoint, or of another of the run's files."""
        if isinstance(error, CheckpointError):
            return error
        steps = sorted(ocp.utils.checkpoint_steps(self._workdir / "checkpoints"))
        intact = f"those of steps {', '.join(map(str, steps))} are intact" if steps else "there is none"
        remedy = "run the same command to resume from the newest"
        text = str(error)
        number = getattr(error, "errno", None)
        if number == errno.EFBIG or "File too large" in text:
            return CheckpointError(f"{self._workdir}: A FILE IS TOO LARGE for the limit of this process (ulimit -f) or "
                                   f"of the file system and could not be written; checkpoints: {intact}. Raise "
                                   f"the limit; {remedy}")
        if number in (errno.ENOSPC, errno.EDQUOT) or any(
                sign in text for sign in ("No space left", "ENOSPC", "quota exceeded")):
            free = "" if is_remote(self._workdir) else (
                f" ({shutil.disk_usage(self._workdir).free / 2**20:,.0f} MiB are free)")
            return CheckpointError(f"{self._workdir}: THE DISK IS FULL{free}: a file of the run could not be written; "
                                   f"checkpoints: {intact}. Make room; {remedy}")
        return CheckpointError(f"{self._workdir}: a checkpoint could not be written: {first_line(error)}; "
                               f"earlier ones: {intact}; {remedy}")


def _unreadable(directory: epath.Path) -> str:
    """Returns what is wrong with a checkpoint's metadata and metrics; '' if nothing is.

    Raises:
      OSError: they can't be read, which says nothing about them.
    """
    try:
        for file in (directory / "_CHECKPOINT_METADATA", directory / "metrics" / "metrics"):
            values = parse_json(file.read_bytes()) if file.exists() else {}
            if not isinstance(values, dict):
                raise ValueError(f"{file.name} is no JSON object")
            if file.name == "metrics":
                {name: float(value) for name, value in values.items()}
    except (ValueError, TypeError) as error:
        return described(error)
    return ""


def _open(workdir: epath.Path, **options: Any) -> ocp.CheckpointManager:
    """Returns Orbax's manager of a run's checkpoints."""
    handlers = {name: handler() for name, handler in _ITEMS.items()}
    return ocp.CheckpointManager(
        workdir / "checkpoints", item_names=tuple(handlers), item_handlers=handlers,
        options=ocp.CheckpointManagerOptions(**options),
    )
