"""Videos to frames, by PyAV. Work and time per file are limited, and every problem is a `VideoError`."""

import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
from PIL import Image

from vocojax.data.images import ImageError, too_large

Sampling = Literal["uniform", "segments", "fps"]
SEEK_FROM = 2.0  # seconds between two chosen frames above which a seek is tried
MAX_DECODED = 2**34  # decoded pixels per video: 8,000 frames of 1920 x 1080, about half a minute of one core
# Playlists, concatenations and image sequences would open other files, some of them elsewhere.
OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts", "protocol_whitelist": "file"}


class VideoError(ImageError):
    """A video that can't be used.

    Attributes:
      reason: a short key to count it under.
    """

    def __init__(self, name: str, problem: str, reason: str):
        super().__init__(name, problem, reason)
        self.args = (f"video {name!r}: {problem}",)


class VideoInfo(NamedTuple):
    """What a file says about its video.

    Attributes:
      frames: number of frames, from the header or from the last time stamp.
      rate: frames per second.
    """

    frames: int
    rate: float


def probe(path: str | Path, seconds: float = 120.0) -> VideoInfo:
    """Reads the header of a video file, or all of its packets if the header does not say how many frames there are.

    Args:
      path: the file.
      seconds: time limit.

    Raises:
      VideoError: as `read_frames`.
    """
    with _Opened(path, seconds) as video:
        return video.info


def choose_frames(info: VideoInfo, sampling: Sampling, count: int) -> list[int]:
    """Returns the indices of the frames to read, in increasing order.

    Args:
      info: of the video.
      sampling: `uniform`: from the first to the last frame at equal distances. `segments`: the middle of each of
        `count` equal segments (Video-ChatGPT). `fps`: one per second (LLaMA-VID: every round(rate)-th), or `count` of
        these at equal distances.
      count: number of frames; with `fps` the most of them.
    """
    if sampling == "fps":
        every_second = np.arange(0, info.frames, max(round(info.rate), 1))
        return every_second[_spread(len(every_second), min(count, len(every_second)))].tolist()
    if sampling == "uniform":
        return _spread(info.frames, count).tolist()
    edges = np.round(np.arange(count + 1) * (info.frames - 1) / count).astype(int)
    return ((edges[:-1] + edges[1:]) // 2).tolist()


def read_frames(
    path: str | Path, sampling: Sampling, count: int, seconds: float = 120.0, seek: bool = True
) -> Iterator[Image.Image]:
    """Yields the frames of a video that `choose_frames` chooses, as RGB images.

    Args:
      path: the file.
      sampling: see `choose_frames`.
      count: see `choose_frames`.
      seconds: time limit, checked between packets (which are of limited size): the last resort against a disk that
        hangs. `MAX_DECODED` stops what is too much work on any machine.
      seek: jump to the keyframe before a frame where that saves decoding; otherwise every frame is decoded.

    Raises:
      VideoError: the file is missing, damaged or not a video, has fewer than `count` frames (with `fps`: none), or is
        too much to decode or too slow.
    """
    with _Opened(path, seconds) as video:
        needed = 1 if sampling == "fps" else count
        if video.info.frames < needed:
            raise VideoError(str(path), f"has {video.info.frames} frames, {needed} are needed", "short video")
        yield from video.frames(choose_frames(video.info, sampling, count), seek)


def _spread(length: int, count: int) -> np.ndarray:
    """Returns `count` indices from 0 to length - 1 at equal distances."""
    return np.round(np.linspace(0, max(length - 1, 0), count)).astype(int)


def _stamp(frame: av.VideoFrame) -> int:
    """Returns a frame's time stamp, in ticks; frames without one are never kept."""
    assert frame.pts is not None
    return frame.pts


class _Opened:
    """An open video file with a deadline; inside the `with` block every exception becomes a `VideoError`."""

    def __init__(self, path: str | Path, seconds: float):
        self._name, self._seconds, self._deadline = str(path), seconds, time.monotonic() + seconds
        self._decoded = 0  # pixels

    def __enter__(self) -> "_Opened":
        try:
            if not stat.S_ISREG(os.stat(self._name).st_mode):
                raise VideoError(self._name, "is not a file", "missing video")
            self._container = self._open()
        except Exception as error:
            raise self._named(error) from error
        try:
            self._stream = self._container.streams.video[0]
            self.info = self._read_info()
        except Exception as error:
            self._container.close()
            raise self._named(error) from error
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._container.close()
        if isinstance(error, Exception):
            raise self._named(error) from error

    def _open(self) -> av.container.InputContainer:
        return av.open(self._name, timeout=self._seconds, metadata_errors="replace", options=OPTIONS)

    def frames(self, indices: Sequence[int], seek: bool) -> Iterator[Image.Image]:
        """Yields the frames at increasing indices (an index may repeat)."""
        start, step = self._stream.start_time or 0, 1 / self.info.rate / self._tick
        decoded, frame = self._decode(), None
        for number, index in enumerate(indices):
            stamp = start + (index - 0.5) * step  # half a frame early, since time stamps are rounded
            position = start if frame is None else _stamp(frame)
            if seek and stamp - position > SEEK_FROM / self._tick:
                self._container.seek(int(stamp), stream=self._stream, backward=True)
                decoded = self._decode()
                frame = next(decoded, None)
                seek = frame is not None and _stamp(frame) > position + step  # else keyframes are too far apart
            if frame is None:
                frame = next(decoded, None)
            while frame is not None and _stamp(frame) < stamp:
                frame = next(decoded, None)
            if frame is None:
                raise VideoError(self._name, f"ends or is damaged after {number} of {len(indices)} frames",
                                 "undecodable video")
            self._check_size(frame.width, frame.height)  # the size may change within a stream
            yield frame.to_image()

    def _decode(self) -> Iterator[av.VideoFrame]:
        for packet in self._packets(self._container):
            self._decoded += self._stream.width * self._stream.height
            if self._decoded > MAX_DECODED:
                raise VideoError(self._name, f"takes more than {MAX_DECODED} decoded pixels", "too many pixels")
            yield from (frame for frame in packet.decode() if frame.pts is not None)

    def _packets(self, container: av.container.InputContainer) -> Iterator[av.Packet]:
        """Yields the packets of the first video stream until the deadline."""
        for packet in container.demux(container.streams.video[0]):
            if time.monotonic() > self._deadline:
                raise VideoError(self._name, f"takes more than {self._seconds:g} s", "slow video")
            yield packet

    def _check_size(self, width: int, height: int) -> None:
        if problem := too_large(width, height):
            raise VideoError(self._name, problem, "too many pixels")

    def _read_info(self) -> VideoInfo:
        stream = self._stream
        self._check_size(stream.width, stream.height)
        if stream.time_base is None:
            raise VideoError(self._name, "has no time base", "undecodable video")
        self._tick = float(stream.time_base)  # seconds
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if rate <= 0:
            raise VideoError(self._name, "has no frame rate", "undecodable video")
        if stream.frames:
            return VideoInfo(stream.frames, rate)
        # The header's duration is that of the longest stream, or an estimate: read the last time stamp.
        with self._open() as whole:
            stamps = [packet.pts for packet in self._packets(whole) if packet.pts is not None]
        if not stamps:
            return VideoInfo(0, rate)
        return VideoInfo(round((max(stamps) - (stream.start_time or 0)) * self._tick * rate) + 1, rate)

    def _named(self, error: Exception) -> VideoError:
        if isinstance(error, VideoError):
            return error
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            return VideoError(self._name, f"cannot be read: {error}", "missing video")
        if isinstance(error, (av.error.ExitError, TimeoutError)):
            return VideoError(self._name, f"takes more than {self._seconds:g} s", "slow video")
        if isinstance(error, IndexError):
            return VideoError(self._name, "has no video stream", "undecodable video")
        if isinstance(error, av.error.ArgumentError):  # the error for a format that is not on the list
            return VideoError(self._name, "is not mp4, mov, mkv, webm, avi or ts, or is damaged", "undecodable video")
        return VideoError(self._name, f"cannot be decoded: {error}", "undecodable video")
