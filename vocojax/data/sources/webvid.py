"""WebVid's CSV: videoid, contentUrl, duration, page_dir, name (the caption); the file is {page_dir}/{videoid}.mp4."""

import csv
from pathlib import Path

from vocojax.data.conversation import Turn, is_unicode
from vocojax.data.sources.base import Root, Sample
from vocojax.errors import InputError
from vocojax.layout import LayoutError

COLUMNS = ("videoid", "page_dir", "name")


class WebVidSource:
    """The captioned videos of a WebVid CSV, for alignment.

    Args:
      path: the CSV file.
      video_root: directory of the `page_dir`s.

    Raises:
      InputError: the file is not a CSV, or lacks a column of `COLUMNS`.
    """

    def __init__(self, path: str | Path, video_root: str | Path):
        with Path(path).open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            try:
                missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
                if missing:
                    raise InputError(f"{path}: not a WebVid CSV: it lacks the columns {', '.join(missing)}")
                self._rows = [tuple(row[column] for column in COLUMNS) for row in reader]
            except csv.Error as error:
                raise InputError(f"{path}: not a WebVid CSV: {error} at line {reader.line_num}") from error
        self._root = Root(video_root)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        video, folder, caption = self._rows[index]
        if not video or folder is None or caption is None:
            raise LayoutError(f"#{index}", "is a row with too few columns", "malformed record")
        if not caption.strip():
            raise LayoutError(video, "has an empty caption", "empty answer")
        if not is_unicode(caption):
            raise LayoutError(video, "has a caption that is not UTF-8", "not UTF-8")
        path = self._root.file(video, f"{folder}/{video}.mp4", "video")
        return Sample(video, (), ((Turn("user", "<video>"), Turn("assistant", caption.strip())),), (path,))
