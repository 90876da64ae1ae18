"""Directories of images that are the frames of a video."""

import os
import re
from pathlib import Path

from vocojax.data.images import VideoError

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def frame_files(path: str | Path) -> tuple[Path, ...]:
    """Returns the images in a directory, in the order of their names, with numbers as numbers; nothing for a file.

    Raises:
      VideoError: the directory can't be read, or holds no image.
    """
    if not os.path.isdir(path):
        return ()
    try:
        found = list(filter(is_frame, Path(path).iterdir()))
    except OSError as error:
        raise VideoError(str(path), f"cannot be read: {error.strerror}", "missing video") from error
    if not found:
        raise VideoError(str(path), f"is a directory without images ({', '.join(FRAME_SUFFIXES)})", "missing video")
    return tuple(sorted(found, key=_natural))


def has_frames(path: str | Path) -> bool:
    """Returns whether a directory holds images; True for one that can't be read, so that its reader reports it."""
    try:
        return any(map(is_frame, Path(path).iterdir()))
    except OSError:
        return True


def is_frame(path: Path) -> bool:
    """Returns whether a file's name is that of a frame."""
    return path.suffix.lower() in FRAME_SUFFIXES and not path.name.startswith(".")


def _natural(path: Path) -> list[tuple[int, str]]:
    """Returns a key that orders frame_2 before frame_10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]
