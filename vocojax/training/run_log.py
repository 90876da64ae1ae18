"""The metrics of a run in metrics.jsonl, in TensorBoard, and in Weights & Biases if asked for. Process 0 writes."""

import hashlib
import html
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar, text

from vocojax.config import ConfigError
from vocojax.files import is_remote, write_atomically
from vocojax.parallel import processes
from vocojax.runs.directory import put_aside, run_path
from vocojax.training.scoring import Sample

LOG = logging.getLogger(__name__)
Steps = Sequence[tuple[int, Mapping[str, float]]]


class RunLog:
    """The metrics of a run, from a step on.

    Object stores can't append, so the files of a remote run are written locally, and `flush` copies them whole.

    Args:
      workdir: the run's directory.
      first_step: lines of later steps are dropped, because the run takes those steps again.
      wandb_project: Weights & Biases project to log to as well, under the same id after a restart; empty for none.
      name: of the run in that project.
    """

    def __init__(self, workdir: str | Path, first_step: int, wandb_project: str = "", name: str = ""):
        self._writes = processes.is_first()
        if not self._writes:
            return
        self._target = run_path(workdir)
        self._temporary = tempfile.TemporaryDirectory() if is_remote(self._target) else None
        self._local = Path(self._temporary.name if self._temporary else self._target)
        self._history = self._local / "metrics.jsonl"
        if self._temporary and (self._target / "metrics.jsonl").exists():
            self._history.write_bytes((self._target / "metrics.jsonl").read_bytes())
        _forget_after(self._history, first_step, self._target / "metrics.jsonl")
        # Not `SummaryWriter`: its thread dies on a full disk, and the next write then never ends.
        self._tensorboard = EventsWriter(str(self._local / "events"), f".{os.getpid()}")
        purge = SessionLog(status=SessionLog.START)
        self._tensorboard.write_event(Event(wall_time=time.time(), step=first_step + 1, session_log=purge))
        self._wandb = _open_wandb(wandb_project, name, str(self._target)) if wandb_project else None

    def write(self, steps: Steps, extra: Mapping[str, float]) -> None:
        """Appends the metrics of some steps, and `extra` once, at the last of them.

        A name has the same spelling everywhere, but that TensorBoard and Weights & Biases group those without a `/`
        under `train/`.
        """
        if not self._writes or not steps:
            return
        lines = [*steps[:-1], (steps[-1][0], {**steps[-1][1], **extra})]
        for number, metrics in lines:
            values = {key if "/" in key else f"train/{key}": value for key, value in metrics.items()}
            for key, value in values.items():
                event = Event(wall_time=time.time(), step=number, summary=scalar(key, float(value)))
                self._tensorboard.write_event(event)
            if self._wandb:
                self._wandb.log(values, step=number)
        with self._history.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": n, **m}) + "\n" for n, m in lines)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Writes answers to TensorBoard and Weights & Biases, with their pictures."""
        if not self._writes:
            return
        for sample in samples:
            summaries = [text(sample.tag, sample.text)]
            if sample.picture_HWC is not None:
                summaries.append(image(sample.tag, sample.picture_HWC, dataformats="HWC"))
            for summary in summaries:
                self._tensorboard.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if self._wandb and samples:
            self._wandb.log({sample.tag: _for_wandb(sample) for sample in samples}, step=step)

    def flush(self) -> None:
        """Writes everything so far to the run's directory."""
        if not self._writes:
            return
        self._tensorboard.flush()
        if self._temporary:
            for file in self._local.iterdir():
                (self._target / file.name).write_bytes(file.read_bytes())

    def close(self) -> None:
        """Flushes and closes; a failure is only logged, because a run that ends must not fail for it."""
        if not self._writes:
            return
        try:
            self.flush()
            self._tensorboard.close()
        except OSError as error:
            LOG.error("the last metrics could not be written: %s", error)
        if self._wandb:
            self._wandb.finish()
        if self._temporary:
            self._temporary.cleanup()


def _for_wandb(sample: Sample) -> Any:
    """Returns a sample as a picture with a caption, or as text."""
    import wandb

    if sample.picture_HWC is None:
        return wandb.Html(f"<pre>{html.escape(sample.text)}</pre>")
    return wandb.Image(sample.picture_HWC, caption=sample.text)


def _open_wandb(project: str, name: str, workdir: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("run.wandb_project", "needs Weights & Biases: pip install -e '.[wandb]'") from None
    identity = hashlib.sha256(workdir.encode()).hexdigest()[:16]
    return wandb.init(project=project, name=name, id=identity, resume="allow")


def _forget_after(history: Path, step: int, original: epath.Path) -> None:
    """Drops the lines of steps that a resumed run will take again, and a line that was cut off.

    Args:
      history: metrics.jsonl, or a local copy of it.
      step: the last step whose line stays.
      original: metrics.jsonl; if lines of it are damaged, it is put aside, and only they are dropped.
    """
    if not history.exists():
        return
    lines = history.read_bytes().splitlines()
    numbers = [_step_of(line) for line in lines]
    if damaged := [index for index, number in enumerate(numbers[:-1], 1) if number is None]:
        LOG.warning("%s: line %d and %d others are damaged, moved to %s; only they are dropped", original, damaged[0],
                    len(damaged) - 1, put_aside(original))
    kept = [line + b"\n" for line, number in zip(lines, numbers, strict=True) if number is not None and number <= step]
    write_atomically(history, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """Returns the step of a line of metrics; None if it is damaged."""
    try:
        values = json.loads(line)
        if all(isinstance(value, int | float) for value in values.values()) and isinstance(values["step"], int):
            return values["step"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None
