"""Videos to frames, by PyAV. Work and time per file are limited, and every problem is a `VideoError`.

Frames are those that decoding the whole file yields, in its order; what a header says of their number and rate is a
hint. The packets of a file are read before any frame is chosen: where each holds one frame with a time stamp, they tell
all frames without decoding them. Files of other kinds are decoded once to count their frames.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.frame import PictureType
from PIL import Image

from vocojax.data.frame_choice import Sampling, VideoInfo, choose_frames
from vocojax.data.frame_files import frame_files
from vocojax.data.images import VideoError, decode, read, too_large
from vocojax.data.timelines import Mark, Timeline, timeline_of_frames, timeline_of_packets

FrameSource = Path | tuple[Path | bytes, ...]  # a file, a directory of frames, or frames (files or their content)
MAX_DECODED = 2**34  # decoded pixels per video: 8,000 frames of 1920 x 1080, about half a minute of one core
MAX_PACKETS = 2**22  # per video: 19 hours of 60 frames a second
# Playlists, concatenations and image sequences would open other files, some of them elsewhere.
OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts", "protocol_whitelist": "file"}
# Containers and codecs with one frame per packet. The first packets of each file are decoded to see that it is so.
ONE_BY_ONE = ({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}, {"h264", "hevc", "vp9", "av1"})
CHECKED = 8
SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts"}  # AVI's time stamps change after a seek
NOT_FRAMES = Disposition.attached_pic | Disposition.timed_thumbnails


class Pick(NamedTuple):
    """A chosen frame.

    Attributes:
      number: its number among all frames.
      stamp: its time stamp, in ticks; 0 if it is found by counting.
      keys: time stamps of the last keyframes up to it, in order; empty if decoding starts at the beginning.
    """

    number: int
    stamp: int
    keys: tuple[int, ...]


@dataclass(frozen=True)
class FramePlan:
    """The chosen frames of a video.

    Attributes:
      video: a video file, or the chosen frames (files or their content).
      picks: the chosen frames of a file, in order.
      is_counted: whether a file's frames are found by counting, because their time stamps do not tell them apart.
    """

    video: FrameSource
    picks: tuple[Pick, ...] = ()
    is_counted: bool = False

    def __len__(self) -> int:
        return len(self.video) if isinstance(self.video, tuple) else len(self.picks)


def probe(path: str | Path, seconds: float = 120.0) -> VideoInfo:
    """Returns the number and rate of a video's frames, from its packets or, where they leave any doubt, by decoding.

    Args:
      path: the file, or a directory of frames.
      seconds: time limit.

    Raises:
      VideoError: as `read_frames`.
    """
    if frames := frame_files(path):
        return VideoInfo(len(frames), 1.0)
    with _Opened(path, seconds) as video:
        timeline = video.timeline()
        return VideoInfo(timeline.frames, timeline.rate)


def plan_frames(
    video: str | FrameSource, sampling: Sampling, count: int, seconds: float = 120.0,
    jitter: np.random.Generator | None = None,
) -> FramePlan:
    """Chooses the frames of a video.

    Args:
      video: a video file, a directory of images (in the order of their names, with numbers as numbers), or frames.
      sampling: see `choose_frames`; a list or a directory of frames counts as one frame per second.
      count: see `choose_frames`.
      seconds: see `read_frames`.
      jitter: see `choose_frames`.

    Raises:
      VideoError: as `read_frames`.
    """
    frames = video if isinstance(video, tuple) else frame_files(video)
    if frames:
        return FramePlan(tuple(frames[i] for i in choose_frames(VideoInfo(len(frames), 1.0), sampling, count, jitter)))
    if isinstance(video, tuple):
        raise VideoError("of a record", "has no frames", "undecodable video")
    with _Opened(video, seconds) as opened:
        timeline = opened.timeline()
        chosen = choose_frames(VideoInfo(timeline.frames, timeline.rate), sampling, count, jitter)
        return FramePlan(Path(video), tuple(_pick(timeline, index) for index in chosen), timeline.stamps is None)


def read_plan(plan: FramePlan, seconds: float = 120.0, seek: bool = True) -> Iterator[Image.Image]:
    """Yields the frames of a plan as RGB images.

    Args:
      plan: from `plan_frames`.
      seconds: see `read_frames`.
      seek: see `read_frames`.

    Raises:
      VideoError: as `read_frames`.
      ImageError: a frame of a list or directory of frames can't be used.
    """
    if isinstance(plan.video, tuple):
        for frame in plan.video:
            yield decode(frame, "frame of a record") if isinstance(frame, bytes) else decode(read(frame), str(frame))
        return
    with _Opened(plan.video, seconds) as video:
        for image in video.frames(plan, seek):
            handed_over = time.monotonic()
            yield image
            video.postpone(time.monotonic() - handed_over)


def read_frames(
    video: str | FrameSource, sampling: Sampling, count: int, seconds: float = 120.0, seek: bool = True
) -> Iterator[Image.Image]:
    """Yields the frames of a video that `choose_frames` chooses, as RGB images, turned as the file says.

    Args:
      video: see `plan_frames`.
      sampling: see `choose_frames`.
      count: see `choose_frames`.
      seconds: time limit for choosing and again for reading, without what the caller does between two frames; checked
        between packets (which are of limited size): the last resort against a disk that hangs. `MAX_DECODED` stops what
        is too much work on any machine.
      seek: jump to the keyframe before a frame where that saves decoding; otherwise every frame is decoded.

    Raises:
      VideoError: the file is missing, damaged or not a video, has no frame, or is too much to decode or too slow.
      ImageError: a frame of a list or directory of frames can't be used.
    """
    yield from read_plan(plan_frames(video, sampling, count, seconds), seconds, seek)


def _pick(timeline: Timeline, index: int) -> Pick:
    if timeline.stamps is None:
        return Pick(index, 0, ())
    stamp = int(timeline.stamps[index])
    before = int(np.searchsorted(timeline.keys, stamp, side="right"))
    return Pick(index, stamp, tuple(timeline.keys[before - 2 : before].tolist()) if before > 1 else ())


def _upright(frame: av.VideoFrame) -> Image.Image:
    """Returns a frame as an RGB image, turned and mirrored by whole quarters as its display matrix says."""
    image, matrix = frame.to_image(), frame.side_data.get(SideData.DISPLAYMATRIX)  # type: ignore[call-overload]
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    if abs(b) > abs(a):
        image, a, d = image.transpose(Image.Transpose.TRANSPOSE), c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if d < 0 else image


def _find(frames: Iterator[av.VideoFrame], stamp: int) -> av.VideoFrame | None:
    """Returns the frame with a time stamp, after which the next one follows; None if it is not there."""
    frame = next((frame for frame in frames if _stamp(frame) >= stamp), None)
    return frame if frame is not None and _stamp(frame) == stamp else None


def _stamp(frame: av.VideoFrame) -> float:
    """Returns a frame's time stamp, in ticks; a frame without one is before all others, so that it is never picked."""
    return -np.inf if frame.pts is None else frame.pts


class _Opened:
    """An open video file with a deadline; inside the `with` block every exception becomes a `VideoError`."""

    def __init__(self, path: str | Path, seconds: float):
        self._name, self._seconds, self._deadline = str(path), seconds, time.monotonic() + seconds
        self._decoded = 0  # pixels

    def __enter__(self) -> "_Opened":
        try:
            is_file = stat.S_ISREG(os.stat(self._name).st_mode)
        except (OSError, ValueError) as error:  # ValueError: a path that no system call takes
            problem = getattr(error, "strerror", None) or error
            raise VideoError(self._name, f"cannot be read: {problem}", "missing video") from error
        if not is_file:
            raise VideoError(self._name, "is not a file", "missing video")
        try:
            self._open()
        except Exception as error:
            raise self._named(error) from error
        try:
            self._check_size(self._stream.width, self._stream.height)
        except Exception as error:
            self._container.close()
            raise self._named(error) from error
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._container.close()
        if isinstance(error, Exception):
            raise self._named(error) from error

    def _open(self) -> None:
        self._container = av.open(self._name, timeout=self._seconds, metadata_errors="replace", options=OPTIONS)
        streams = [s for s in self._container.streams.video if not s.disposition & NOT_FRAMES]
        if not streams or streams[0].codec_context is None:
            self._container.close()
            raise VideoError(self._name, "has no video stream of a known codec", "undecodable video")
        self._stream = streams[0]

    def _restart(self) -> None:
        self._container.close()
        self._open()

    def postpone(self, seconds: float) -> None:
        """Moves the deadline by the time that somebody else took."""
        self._deadline += seconds

    def timeline(self) -> Timeline:
        """Returns when the frames are shown; reads the whole file, and decodes it if its packets leave any doubt."""
        tick = float(self._stream.time_base or 0)
        rate = max(float(self._stream.average_rate or self._stream.guessed_rate or 0), 0.0)
        containers, codecs = ONE_BY_ONE
        timeline = None
        if self._container.format.name in containers and self._stream.codec_context.codec.canonical_name in codecs:
            timeline = timeline_of_packets(self._marks_of_packets(), tick, rate)
            self._restart()
        if timeline is None:
            marks = [Mark(frame.pts, frame.key_frame) for frame in self._decode()]
            timeline = timeline_of_frames(marks, tick, rate)
        if not timeline.frames:
            raise VideoError(self._name, "has no frame that can be decoded", "undecodable video")
        return timeline

    def _marks_of_packets(self) -> list[Mark]:
        """Returns the marks of all packets; none if a packet is damaged or the first ones hold other frames."""
        marks: list[Mark] = []
        stamps: list[int | None] = []
        try:
            for packet in self._packets():
                if packet.is_corrupt:
                    return []
                marks.append(Mark(packet.pts, packet.is_keyframe, packet.is_discard))
                if len(marks) <= CHECKED:
                    stamps += [frame.pts for frame in self._stream.codec_context.decode(packet)]
            stamps += [frame.pts for frame in self._stream.codec_context.decode(None)]
        except av.error.InvalidDataError:
            return []
        expected = [mark.stamp for mark in marks[:CHECKED] if not mark.is_hidden]
        return marks if len(stamps) == len(expected) and set(stamps) == set(expected) else []

    def frames(self, plan: FramePlan, seek: bool) -> Iterator[Image.Image]:
        """Yields the picked frames (a frame may be picked again)."""
        found = self._by_count(plan.picks) if plan.is_counted else self._by_stamp(plan.picks, seek)
        for index, pick in enumerate(plan.picks):
            frame = next(found, None)
            if frame is None:
                raise VideoError(self._name, f"ends or is damaged after {index} of {len(plan.picks)} frames",
                                 "undecodable video")
            if frame.is_corrupt:  # what is missing was made up from other frames
                raise VideoError(self._name, f"is damaged at frame {pick.number}", "undecodable video")
            self._check_size(frame.width, frame.height)  # the size may change within a stream
            yield _upright(frame)

    def _by_count(self, picks: Sequence[Pick]) -> Iterator[av.VideoFrame]:
        """Yields the picked frames up to the end of the file, which is decoded from the beginning."""
        left = list(reversed(picks))
        for number, frame in enumerate(self._decode()):
            while left and left[-1].number == number:
                left.pop()
                yield frame
            if not left:
                return

    def _by_stamp(self, picks: Sequence[Pick], seek: bool) -> Iterator[av.VideoFrame]:
        """Yields the picked frames up to one that is not there."""
        seek = seek and self._container.format.name in SEEKABLE
        decoded, frame = self._decode(), None
        for pick in picks:
            if seek and pick.keys and (frame is None or pick.keys[-1] > _stamp(frame)):
                decoded, frame = self._sought(pick)
                if frame is None:  # this file's seeks do not lead to its keyframes
                    seek = False
                    self._restart()
                    decoded = self._decode()
            if frame is None or _stamp(frame) < pick.stamp:
                frame = _find(decoded, pick.stamp)
            if frame is None:
                return
            yield frame

    def _sought(self, pick: Pick) -> tuple[Iterator[av.VideoFrame], av.VideoFrame | None]:
        """Returns the frames from after a seek on, and the picked one; None if no seek leads to it."""
        decoded: Iterator[av.VideoFrame] = iter(())
        for key in reversed(pick.keys):
            try:
                self._container.seek(key, stream=self._stream, backward=True)
                decoded = self._decode(pick.stamp)
                if frame := _find(decoded, pick.stamp):
                    return decoded, frame
            except (av.error.InvalidDataError, av.error.PermissionError):  # the latter: the file can't be sought in
                continue
        return decoded, None

    def _decode(self, latest: int | None = None) -> Iterator[av.VideoFrame]:
        """Yields decoded frames.

        Args:
          latest: after a seek: the time stamp up to which there must be a whole keyframe, where decoding starts; if
            there is none, the seek landed too late and nothing is yielded.
        """
        begun, first = False, None
        for packet in self._packets():
            if latest is not None:
                if not packet.is_keyframe:
                    continue
                if packet.pts is None or packet.pts > latest:
                    return
                latest, first = None, packet.pts
            self._decoded += self._stream.width * self._stream.height
            if self._decoded > MAX_DECODED:
                raise VideoError(self._name, f"takes more than {MAX_DECODED} decoded pixels", "too many pixels")
            try:
                frames = self._stream.codec_context.decode(packet)
            except av.error.InvalidDataError:
                if begun:
                    raise
                continue  # a recording begins in the middle of a group of pictures
            if first is not None and (frames := [frame for frame in frames if _stamp(frame) >= first]):
                if frames[0].pts != first or frames[0].pict_type != PictureType.I:  # the picture is built up gradually
                    return
                first = None
            begun = begun or bool(frames)
            yield from frames
        yield from self._stream.codec_context.decode(None)

    def _packets(self) -> Iterator[av.Packet]:
        """Yields the packets of the video stream, up to the limits; not the empty ones, which would end decoding."""
        for number, packet in enumerate(self._container.demux(self._stream)):
            if number > MAX_PACKETS:
                raise VideoError(self._name, f"has more than {MAX_PACKETS} packets", "too many frames")
            if time.monotonic() > self._deadline:
                raise VideoError(self._name, f"takes more than {self._seconds:g} s", "slow video")
            if packet.size:
                yield packet

    def _check_size(self, width: int, height: int) -> None:
        if problem := too_large(width, height):
            raise VideoError(self._name, problem, "too many pixels")

    def _named(self, error: Exception) -> VideoError:
        if isinstance(error, VideoError):
            return error
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            return VideoError(self._name, f"cannot be read: {error}", "missing video")
        if isinstance(error, (av.error.ExitError, TimeoutError)):
            return VideoError(self._name, f"takes more than {self._seconds:g} s", "slow video")
        problem: str | None = "it is damaged"
        if isinstance(error, av.error.FFmpegError):
            if error.errno == errno.EINVAL:  # the error for a format that is not on the list
                return VideoError(self._name, "is not mp4, mov, mkv, webm, avi or ts, or is damaged",
                                  "undecodable video")
            problem = error.strerror
        return VideoError(self._name, f"cannot be decoded: {problem}", "undecodable video")
