"""A look at the files that a source's records name, before anything expensive begins."""

from pathlib import Path

from vocojax.config import ConfigError
from vocojax.data.config import DataConfig, PartConfig
from vocojax.data.sources.base import Source
from vocojax.layout import LayoutError

LOOKS = 16  # records that are looked at, evenly spread


def require_some_files(source: Source, part: DataConfig | PartConfig, key: str) -> None:
    """Looks for the images and videos of a few records, because a wrong root is found one skipped record at a time.

    A single missing file is no error here: records that can't be used are skipped and counted.

    Args:
      source: the records.
      part: where they come from.
      key: the config's key of `part`, for errors.

    Raises:
      ConfigError: none of the files is there.
    """
    if not part.image_root or not len(source):
        return
    files = _files(source)
    if files and not any(path.exists() for path in files):
        raise ConfigError(f"{key}.image_root", f"must be the directory of the files that {part.path} names: all "
                          f"{len(files)} looked for were missing below {part.image_root}; the first is {files[0]}")


def _files(source: Source) -> list[Path]:
    """Returns the files that some records name."""
    count = len(source)
    files: list[Path] = []
    for record in sorted({index * count // LOOKS for index in range(LOOKS)}):
        try:
            sample = source[record]
        except LayoutError:  # skipped and counted when it is read for training
            continue
        for one in (*sample.images, *sample.videos):
            files += [Path(path) for path in (one if isinstance(one, list | tuple) else (one,))
                      if isinstance(path, str | Path)]
    return files
