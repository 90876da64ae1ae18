"""Visuals: an image, the tiles of one, or the frames of a video are k units under one digest."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image

from vocojax.config import require, require_positive
from vocojax.data.images import Fit, ImageError, decode, prepare_units, read
from vocojax.data.videos import Sampling, read_frames
from vocojax.inference.caches.fingerprint import image_digest, visual_digest


@dataclass(frozen=True)
class Video:
    """A video file, of which some frames are read.

    Attributes:
      path: of the file.
      frames: how many are read, each a unit (at most as many, where `sampling` is `fps`).
      sampling: which frames, see `data.videos.choose_frames`.
      seconds: time limit for reading the file.
    """

    path: str | Path
    frames: int = 8
    sampling: Sampling = "uniform"
    seconds: float = 120.0

    def __post_init__(self) -> None:
        require_positive(self, "frames")
        require(self.sampling in get_args(Sampling), "sampling", f"must be one of {list(get_args(Sampling))}",
                self.sampling)
        require(self.seconds > 0, "seconds", "must be > 0", self.seconds)


@dataclass(frozen=True)
class Frames:
    """Images that are one visual, such as the decoded frames of a video.

    Attributes:
      images: RGB images in their order.
    """

    images: tuple[Image.Image, ...]


@dataclass(frozen=True, eq=False)
class Visual:
    """Prepared units that are compressed, stored and named together.

    Attributes:
      units: uint8 [size, size, 3] each, at least one.
    """

    units: tuple[np.ndarray, ...]

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the pixels: a single image's is `image_digest`."""
        return visual_digest([image_digest(unit) for unit in self.units])


# What a visual is made of. An array is one prepared unit [size, size, 3] or several [k, size, size, 3], uint8.
VisualSource = str | Path | Image.Image | np.ndarray | Video | Frames | Visual


def prepare_visual(source: VisualSource, size: int, fit: Fit) -> Visual:
    """Reads and prepares a visual.

    Args:
      source: a file, an image, frames, or prepared units.
      size: edge of a unit's image, in pixels.
      fit: how images become square; with `anyres` every image becomes several units.

    Raises:
      ImageError: it can't be used.
    """
    if isinstance(source, Visual | np.ndarray):
        return Visual(_checked(source, size))
    if isinstance(source, Video):
        images: Iterable[Image.Image] = read_frames(source.path, source.sampling, source.frames, source.seconds)
    elif isinstance(source, Frames):
        images = (image.convert("RGB") for image in source.images)
    elif isinstance(source, Image.Image):
        images = [source.convert("RGB")]
    elif isinstance(source, str | Path):
        images = [decode(read(source), str(source))]
    else:
        raise ImageError("image", f"must be a path, a PIL image, an array, a Video, Frames or a Visual, got "
                         f"{type(source).__name__}", "no image")
    units = tuple(unit for image in images for unit in prepare_units(image, size, fit))
    if not units:
        raise ImageError(str(source), "has no image: give at least one", "no image")
    return Visual(units)


def listed(sources: VisualSource | Sequence[VisualSource]) -> list[VisualSource]:
    """Returns one source, or several, as a list."""
    return [sources] if isinstance(sources, VisualSource) or not isinstance(sources, Sequence) else list(sources)


def _checked(source: Visual | np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """Returns units that are prepared already, if they are."""
    units = source.units if isinstance(source, Visual) else tuple(source) if source.ndim == 4 else (source,)
    if not units or any(unit.shape != (size, size, 3) or unit.dtype != np.uint8 for unit in units):
        found = sorted({f"{unit.dtype}{list(unit.shape)}" for unit in units}) or "none"
        raise ImageError("array", f"must be one or several uint8 [{size}, {size}, 3], got {found}: pass the image "
                         "itself, or prepare it with Assistant.load_images", "unprepared image")
    return units
