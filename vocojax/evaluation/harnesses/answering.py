"""The model that a harness asks: opened by the harness's arguments, answering from a store of caches."""

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vocojax.config import require
from vocojax.data.frame_choice import Sampling
from vocojax.errors import InputError
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.store import Store
from vocojax.inference.many import answer_many
from vocojax.inference.requests import Answer, Request
from vocojax.inference.visuals import Video
from vocojax.layout import Visibility
from vocojax.parallel.mesh import parse_mesh

logger = logging.getLogger(__name__)


class Answering:
    """A model with the settings that all harnesses share.

    Each visual is compressed once: without a store of the user's, caches lie in a temporary directory until the
    process ends.

    Args:
      pretrained: directory of the weights, in any layout, or of a run of training.
      store: directory for caches of visuals, to use them again; None keeps none.
      num_vocos: how many VoCo tokens of each unit are read; None for all.
      batch_size: requests that are answered at once.
      frames: the most frames that are read of a video.
      frame_sampling: which frames, see `data.frame_choice.choose_frames`.
      visibility: who sees whom; None for what the model was trained with.
      template: of the conversation, if the directory does not say it.
      dtype: of parameters and computation; None keeps the one on disk.
      mesh: `DATA,FSDP,TENSOR` over this process's devices; None for the first device.

    Attributes:
      assistant: the model.
      batch_size: as given.
    """

    def __init__(
        self,
        pretrained: str | Path,
        store: str | Path | None = None,
        num_vocos: int | None = None,
        batch_size: int = 32,
        frames: int = 8,
        frame_sampling: Sampling = "uniform",
        visibility: Visibility | None = None,
        template: str | None = None,
        dtype: str | None = None,
        mesh: str | None = None,
    ):
        require(isinstance(batch_size, int) and batch_size >= 1, "batch_size", "must be a whole number >= 1",
                batch_size)
        Video("", frames, frame_sampling)  # refuses what no video can be read with
        self.assistant = Assistant.from_pretrained(pretrained, visibility=visibility, template=template, dtype=dtype,
                                                   mesh=parse_mesh(mesh))
        self.batch_size = batch_size
        self._num_vocos, self._frames, self._frame_sampling = num_vocos, frames, frame_sampling
        self._temporary = tempfile.TemporaryDirectory(prefix="vocojax-caches-") if store is None else None
        self._store = Store(self._temporary.name if self._temporary else store)  # type: ignore[arg-type]

    @property
    def longest(self) -> int:
        """The most tokens that an answer may have: the decoder's positions."""
        return self.assistant.model.config.decoder.max_positions

    def video(self, path: str | Path, frames: int | None = None) -> Video:
        """Returns a video file as a visual of at most `frames` frames; None for the number given at first."""
        return Video(path, frames or self._frames, self._frame_sampling)

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers requests at once."""
        return list(answer_many(self.assistant, requests, self._store, batch_size=self.batch_size,
                                num_vocos=self._num_vocos, progress=None))


def require_known(arguments: Mapping[str, Any], others: Iterable[str]) -> None:
    """Refuses arguments of a harness that neither `Answering` nor the adapter knows.

    Args:
      arguments: by name.
      others: names that the adapter knows.

    Raises:
      InputError: names the unknown ones and all that are known.
    """
    known = (Answering.__init__.__annotations__.keys() - {"return"}) | set(others)
    unknown = sorted(arguments.keys() - known)
    if unknown:
        raise InputError(f"the model has no argument {', '.join(unknown)}; known: {', '.join(sorted(known))}")


def report_unused(unused: dict[str, Any], where: str) -> None:
    """Logs generation settings that this model does not follow."""
    if unused:
        named = ", ".join(f"{name}={value!r}" for name, value in unused.items())
        logger.warning("%s: generation settings that vocojax does not follow: %s", where, named)
