"""Visuals: an image, the tiles of one, or the frames of a video are k units under one digest."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image

from vocojax.config import require, require_positive
from vocojax.data.frame_choice import Sampling
from vocojax.data.images import Fit, ImageError, decode, prepare_frame, prepare_units, read, to_rgb
from vocojax.data.videos import read_frames
from vocojax.inference.caches.fingerprint import image_digest, visual_digest


@dataclass(frozen=True)
class Video:
    """A video, of which some frames are read.

    Attributes:
      path: the file, or a directory of frames.
      frames: the most frames that are read, each a unit.
      sampling: which frames, see `data.frame_choice.choose_frames`.
      seconds: time limit for reading the file.
    """

    path: str | Path
    frames: int = 8
    sampling: Sampling = "uniform"
    seconds: float = 120.0

    def __post_init__(self) -> None:
        whole = isinstance(self.frames, int) and not isinstance(self.frames, bool)
        require(whole, "frames", "must be a whole number", self.frames)
        require_positive(self, "frames")
        require(self.sampling in get_args(Sampling), "sampling", f"must be one of {list(get_args(Sampling))}",
                self.sampling)
        require(isinstance(self.seconds, int | float), "seconds", "must be a number", self.seconds)
        require(self.seconds > 0, "seconds", "must be > 0", self.seconds)


@dataclass(frozen=True)
class Frames:
    """Images that are one visual, such as the decoded frames of a video.

    Attributes:
      images: images in their order, each a unit.
    """

    images: tuple[Image.Image, ...]


@dataclass(frozen=True, eq=False)
class Visual:
    """Prepared units that are compressed, stored and named together.

    Attributes:
      units: uint8 [size, size, 3] each, at least one.
    """

    units: tuple[np.ndarray, ...]

    def __repr__(self) -> str:
        sizes = {getattr(unit, "shape", None) for unit in self.units}
        return f"Visual({len(self.units)} units of {' or '.join(map(str, sizes))})"

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the pixels: a single image's is `image_digest`."""
        return visual_digest([image_digest(unit) for unit in self.units])


# What a visual is made of: a path, a file's content, an image, ... An array is uint8 RGB [height, width, 3], or several
# such images [k, height, width, 3]; of the model's own size they are prepared units.
VisualSource = str | Path | bytes | Image.Image | np.ndarray | Video | Frames | Visual
# What one frame is made of; an array is uint8 RGB [height, width, 3].
FrameSource = str | Path | bytes | Image.Image | np.ndarray


def prepare_visual(source: VisualSource, size: int, fit: Fit) -> Visual:
    """Reads and prepares a visual.

    Args:
      source: a file or its content, an image, frames, or prepared units.
      size: edge of a unit's image, in pixels.
      fit: how images become square; with `anyres` an image becomes several units, a frame one.

    Raises:
      ImageError: it can't be used.
    """
    if isinstance(source, Visual):
        return Visual(_checked(source, size))
    units: tuple[np.ndarray, ...]
    if isinstance(source, np.ndarray):
        return Visual(_units_of_array(source, size, fit))
    if isinstance(source, Video | Frames):
        units = tuple(prepare_frame(frame, size, fit) for frame in _frames(source))
    elif isinstance(source, Image.Image):
        units = prepare_units(to_rgb(source, getattr(source, "filename", "") or "in memory"), size, fit)
    elif isinstance(source, str | Path):
        units = prepare_units(decode(read(source), str(source)), size, fit)
    elif isinstance(source, bytes):
        units = prepare_units(decode(source, "in memory"), size, fit)
    else:
        raise ImageError("image", f"must be a path, a PIL image, an array, a Video, Frames or a Visual, got "
                         f"{type(source).__name__}; the bytes of an image file will do too", "no image")
    if not units:
        raise ImageError(str(source), "has no image: give at least one", "no image")
    return Visual(units)


def frame_units(frames: Video | Iterable[FrameSource], size: int, fit: Fit) -> Iterator[np.ndarray]:
    """Yields frames as prepared units, each when it is asked for, so that few are in memory.

    Args:
      frames: a video, or frames in their order.
      size: edge of a unit's image, in pixels.
      fit: how frames become square; see `prepare_frame`.

    Raises:
      ImageError: one of them can't be used.
    """
    if isinstance(frames, str | Path | bytes | Image.Image | np.ndarray) or not isinstance(frames, Video | Iterable):
        raise ImageError("frames", f"must be a Video or a list of frames, got {type(frames).__name__}: write [frame] "
                         "for one, Video(path) for a file", "no image")
    images = _frames(frames) if isinstance(frames, Video) else map(_frame, itertools.count(), frames)
    return (prepare_frame(image, size, fit) for image in images)


def _frame(number: int, source: FrameSource) -> Image.Image:
    """Returns one frame as an RGB image."""
    name = f"frame {number}"
    if isinstance(source, Image.Image):
        return to_rgb(source, name)
    if isinstance(source, str | Path):
        return decode(read(source), str(source))
    if isinstance(source, bytes):
        return decode(source, name)
    is_array = isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 3
    if is_array and source.shape[2] == 3 and source.size:
        return Image.fromarray(source)
    found = f"{source.dtype}{list(source.shape)}" if isinstance(source, np.ndarray) else type(source).__name__
    raise ImageError(name, f"must be a file, its content, a PIL image or a uint8 array [height, width, 3], got {found}",
                     "no image")


def _frames(source: Video | Frames) -> Iterable[Image.Image]:
    """Returns RGB frames."""
    if isinstance(source, Video):
        return read_frames(source.path, source.sampling, source.frames, source.seconds)
    if not all(isinstance(image, Image.Image) for image in source.images):
        raise ImageError("frames", "must be PIL images", "no image")
    return (to_rgb(image, f"frame {number}") for number, image in enumerate(source.images))


def listed(sources: VisualSource | Sequence[VisualSource]) -> list[VisualSource]:
    """Returns one source, or several, as a list."""
    is_one = isinstance(sources, VisualSource) or not isinstance(sources, Sequence)
    return [sources] if is_one else list(sources)  # type: ignore[arg-type, list-item]


def _units_of_array(array: np.ndarray, size: int, fit: Fit) -> tuple[np.ndarray, ...]:
    """Returns the units of one image or of several in an array; those of the model's own size are taken as they are."""
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3 or not array.size:
        raise ImageError("array", "must be uint8 RGB [height, width, 3], or several such images [k, height, width, 3], "
                         f"got {array.dtype}{list(array.shape)}: convert it (0 to 255, channels last), or pass a PIL "
                         "image", "no image")
    images = tuple(array) if array.ndim == 4 else (array,)
    if array.shape[-3:] == (size, size, 3):
        return images
    if array.ndim == 3:
        return prepare_units(Image.fromarray(array), size, fit)
    return tuple(prepare_frame(Image.fromarray(image), size, fit) for image in images)


def _checked(visual: Visual, size: int) -> tuple[np.ndarray, ...]:
    """Returns a visual's units if they are those of a model with images of this size."""
    units = visual.units
    if not all(isinstance(unit, np.ndarray) for unit in units):
        raise ImageError("units", "must be arrays", "unprepared image")
    if not units or any(unit.shape != (size, size, 3) or unit.dtype != np.uint8 for unit in units):
        found = sorted({f"{unit.dtype}{list(unit.shape)}" for unit in units}) or "none"
        raise ImageError("a Visual", f"must hold one or several uint8 [{size}, {size}, 3], got {found}: pass the image "
                         "itself", "unprepared image")
    return units
