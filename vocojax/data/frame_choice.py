"""Which frames of a video are read."""

from typing import Literal, NamedTuple

import numpy as np

Sampling = Literal["uniform", "segments", "fps"]


class VideoInfo(NamedTuple):
    """The number and the rate of a video's frames.

    Attributes:
      frames: number of frames.
      rate: frames per second, on average; 1 for a list or a directory of frames.
    """

    frames: int
    rate: float


def choose_frames(
    info: VideoInfo, sampling: Sampling, count: int, jitter: np.random.Generator | None = None
) -> list[int]:
    """Returns the indices of the frames to read, in increasing order; all of them if there are not more than `count`.

    Args:
      info: of the video.
      sampling: `uniform`: from the first to the last frame at equal distances. `segments`: the middle of each of
        `count` equal segments (Video-ChatGPT). `fps`: one per second (LLaMA-VID: every round(rate)-th), or `count` of
        these at equal distances.
      count: the most frames.
      jitter: for training: takes instead of each of these frames one that is drawn among those that are nearest to it.
    """
    if sampling == "fps":
        every_second = np.arange(0, info.frames, max(round(info.rate), 1))
        chosen = every_second[_spread(len(every_second), min(count, len(every_second)))]
    elif info.frames <= count:
        chosen = np.arange(info.frames)
    elif sampling == "uniform":
        chosen = _spread(info.frames, count)
    else:
        edges = np.round(np.arange(count + 1) * (info.frames - 1) / count).astype(int)
        chosen = (edges[:-1] + edges[1:]) // 2
    if jitter is not None and len(chosen):
        between = (chosen[:-1] + chosen[1:] + 1) // 2
        chosen = jitter.integers(np.concatenate([[0], between]), np.concatenate([between, [info.frames]]))
    return chosen.tolist()


def _spread(length: int, count: int) -> np.ndarray:
    """Returns `count` indices from 0 to length - 1 at equal distances."""
    return np.round(np.linspace(0, max(length - 1, 0), count)).astype(int)
