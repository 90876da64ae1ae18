"""Long videos: frames are compressed in batches as they arrive, and their VoCo tokens' keys and values are kept."""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

from vocojax.config import require
from vocojax.data.conversation import Conversation, Turn
from vocojax.errors import InputError
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.caches.store import Store
from vocojax.inference.compress import BATCH
from vocojax.inference.decoding.sampling import GREEDY, SamplingConfig
from vocojax.inference.visuals import FrameSource, Video, Visual, frame_units
from vocojax.layout import SampleLayout, lay_out_unit
from vocojax.models.voco import VocoLlama
from vocojax.pretrained.processor import Processor

Policy = Literal["error", "drop_oldest", "thin"]
TEXT_ROOM = 96  # positions of the decoder that the default limit leaves for a prompt's text and its answer
log = logging.getLogger(__name__)


class _Assistant(Protocol):
    """The part of `Assistant` that a session needs."""

    model: VocoLlama
    processor: Processor

    @property
    def reads_caches(self) -> bool: ...

    def caches_of(self, visuals: Sequence[Visual], store: Store | None, batch_size: int) -> list[VocoCache]: ...

    def lay_out(self, conversation: Conversation, num_units: int, cache: VocoCache | None) -> SampleLayout: ...

    def read(
        self, cache: VocoCache, questions: str, units: None, sampling: SamplingConfig, seeds: Sequence[int] | None
    ) -> list[str]: ...


class _Frame(NamedTuple):
    """A frame that is kept.

    Attributes:
      number: among all frames that were added.
      cache: of the frame; its prepared image until it is compressed.
    """

    number: int
    cache: VocoCache | Visual


class VideoSession:
    """A video that arrives frame by frame, and questions about what has been seen of it.

        session = assistant.video(policy="thin")
        session.add_frames(frames)
        session.answer("what happens?")

    At most `batch_size` prepared frames and `limit` frames' keys and values are held. Frames are one visual each in the
    store, named by their pixels.

    Args:
      assistant: compresses and answers.
      limit: the most frames that are kept; None for as many as the decoder's `max_positions` have room for.
      policy: what happens when one more frame than `limit` arrives. `error`: it is refused. `drop_oldest`: the oldest
        frame is dropped. `thin`: of the oldest half, every second frame is dropped. Dropped frames are counted and
        logged.
      store: where caches of frames are sought and put; None for no store.
      batch_size: frames that are compressed at once.

    Attributes:
      frames_seen: how many frames were added.
      frames_dropped: how many of them the policy has dropped.

    Raises:
      InputError: the limit is too large for the decoder, or the model does not answer from caches.
      ConfigError: the policy, the limit or the batch size is none of these.
    """

    def __init__(
        self, assistant: _Assistant, limit: int | None = None, policy: Policy = "error", store: Store | None = None,
        batch_size: int = BATCH,
    ):
        require(policy in get_args(Policy), "policy", f"must be one of {list(get_args(Policy))}", policy)
        require(type(batch_size) is int and batch_size >= 1, "batch_size", "must be a whole number >= 1", batch_size)
        require(limit is None or (type(limit) is int and limit >= 1), "limit", "must be a whole number >= 1 or None",
                limit)
        if not assistant.reads_caches:
            raise InputError("a session needs a model that answers from VoCo caches; this one reads whole images")
        if policy == "thin":
            require(limit is None or limit >= 2, "limit", "must be >= 2 with the policy 'thin'", limit)
        positions, self._stride = assistant.model.config.decoder.max_positions, _stride(assistant.processor)
        if limit is not None and limit * self._stride >= positions:
            raise InputError(f"limit must be at most {(positions - 1) // self._stride}: a frame takes {self._stride} "
                             f"of the decoder's {positions} positions; got {limit}")
        self.limit = max((positions - TEXT_ROOM) // self._stride, 2) if limit is None else limit
        self.policy: Policy = policy
        self.frames_seen = self.frames_dropped = 0
        self._assistant, self._store, self._batch_size = assistant, store, batch_size
        self._kept: list[_Frame] = []

    @property
    def frames(self) -> tuple[int, ...]:
        """The numbers of the frames that are kept, in order; the first frame that was added is 0."""
        return tuple(frame.number for frame in self._kept)

    @property
    def cache(self) -> VocoCache:
        """The cache of the frames that are kept, in order.

        Raises:
          InputError: there are none.
        """
        self._compress()
        if not self._kept:
            raise InputError("the session has no frame yet: call add_frames before asking")
        return VocoCache.concat([frame.cache for frame in self._kept if isinstance(frame.cache, VocoCache)])

    def add_frames(self, frames: Video | Iterable[FrameSource]) -> None:
        """Adds frames to the end of the video.

        Args:
          frames: a video, or images in their order, which may be generated while they are added: files or their
            content, PIL images, or uint8 RGB arrays [height, width, 3].

        Raises:
          ImageError: a frame can't be used; those before it were added.
          InputError: with the policy `error`, there are more than `limit` frames; those before were added.
        """
        processor, before = self._assistant.processor, self.frames_dropped
        try:
            for unit in frame_units(frames, processor.image_size, processor.fit):
                self._add(Visual((unit,)))
        finally:
            if dropped := self.frames_dropped - before:
                log.warning("%d frames dropped (%s): more than %d do not fit; %d of %d are kept", dropped, self.policy,
                            self.limit, len(self._kept), self.frames_seen)

    def answer(self, question: str, sampling: SamplingConfig = GREEDY, seed: int | None = None) -> str:
        """Answers a question about the frames that are kept.

        The answer is no longer than the decoder has positions left for; where that is less than
        `sampling.max_new_tokens`, it is logged.

        Args:
          question: about the frames.
          sampling: how the answer's tokens are chosen.
          seed: of its draws; by default `sampling.seed`.

        Raises:
          InputError: there is no frame yet, or no position left for an answer.
          LayoutError: the question is too long.
        """
        cache = self.cache
        sample = self._assistant.lay_out((Turn("user", question),), cache.num_units, cache)
        used = cache.num_units * self._stride + len(sample) - sample.text_start
        left = self._assistant.model.config.decoder.max_positions - used
        if left < 1:
            raise InputError(f"{cache.num_units} frames and the question take all positions of the decoder: ask less, "
                             "or make a session with a smaller limit")
        if left < sampling.max_new_tokens:
            log.warning("the answer ends after %d tokens at the latest: no more positions of the decoder are left "
                        "after %d frames; a session with a smaller limit leaves more", left, cache.num_units)
            sampling = dataclasses.replace(sampling, max_new_tokens=left)
        (answer,) = self._assistant.read(cache, question, None, sampling, None if seed is None else [seed])
        return answer

    def _add(self, visual: Visual) -> None:
        """Adds a frame, drops what is beyond the limit, and compresses a batch that is complete."""
        if self.policy == "error" and len(self._kept) == self.limit:
            raise InputError(f"the session is full with {self.limit} frames: choose the policy 'drop_oldest' or "
                             "'thin', or add fewer frames")
        self._kept.append(_Frame(self.frames_seen, visual))
        self.frames_seen += 1
        if len(self._kept) > self.limit:
            self._kept = _fewer(self._kept, self.policy)
            self.frames_dropped = self.frames_seen - len(self._kept)
        if self.frames_seen % self._batch_size == 0:
            self._compress()

    def _compress(self) -> None:
        """Replaces the prepared frames by their caches."""
        waiting = [frame.cache for frame in self._kept if isinstance(frame.cache, Visual)]
        if waiting:
            caches = iter(self._assistant.caches_of(waiting, self._store, self._batch_size))
            self._kept = [frame._replace(cache=next(caches)) if isinstance(frame.cache, Visual) else frame
                          for frame in self._kept]


def compress_video(
    assistant: _Assistant, video: Video, store: Store | None = None, batch_size: int = BATCH
) -> VocoCache:
    """Compresses a video batch by batch: all frames' pixels are never held at once.

    Args:
      assistant: compresses.
      video: the file, and which of its frames.
      store: where caches of frames are sought and put, each frame a visual of its own; None for no store.
      batch_size: frames that are decoded and compressed at once.

    Returns:
      The cache of the frames, in their order.

    Raises:
      ImageError: the video can't be used.
    """
    require(type(batch_size) is int and batch_size >= 1, "batch_size", "must be a whole number >= 1", batch_size)
    units = frame_units(video, assistant.processor.image_size, assistant.processor.fit)
    caches: list[VocoCache] = []
    while batch := [Visual((unit,)) for unit in itertools.islice(units, batch_size)]:
        caches += assistant.caches_of(batch, store, batch_size)
    return VocoCache.concat(caches)


def _stride(processor: Processor) -> int:
    """Returns how many positions of the decoder each frame takes: its VoCo tokens, or with sequential positions all."""
    return processor.unit.stride(len(lay_out_unit("unit", processor.tokenizer, processor.unit)))


def _fewer(frames: list[_Frame], policy: Policy) -> list[_Frame]:
    """Returns the frames that a policy keeps when there is one too many."""
    if policy == "drop_oldest":
        return frames[1:]
    half = max(len(frames) // 2, 2)
    return frames[:half:2] + frames[half:]
