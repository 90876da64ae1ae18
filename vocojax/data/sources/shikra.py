"""Shikra's jsonl files: referring expressions with boxes (REC, REG) and questions about points (PointQA).

`data/boxes.py` says how boxes are written. With an image that is not padded but squashed to a square, coordinates are
shares of the image itself: the text of a box depends on how images are fitted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from vocojax.data.boxes import box_text, to_padded_square
from vocojax.data.conversation import Turn, is_unicode
from vocojax.data.images import Fit, ImageError, pixel_size, read
from vocojax.data.sources.base import Root, Sample
from vocojax.data.sources.columnar import ColumnarRecords
from vocojax.errors import InputError
from vocojax.layout import LayoutError

Task = Literal["rec", "reg", "pointqa"]
# One of Shikra's templates for each task. The benchmarks ask with the same ones (vocojax/evaluation/benchmarks).
REC_QUESTION = "Where is {expression}?"
REG_QUESTION = "Please generate a distinguishing description for the region {box} in the image."
POINT_QUESTION_KEYS = ("question", "obj_question", "super_question", "general_question")
POINT_QUESTION = "Please quickly answer this question: {question}{place} in a simple manner."


class ShikraSource:
    """The records of a Shikra jsonl file.

    Args:
      path: the file, with the keys `img_path`, `expression`, `bbox` for `rec` and `reg`; `file_path`, `question` (or
        some of `POINT_QUESTION_KEYS`, as in the files of PointQA Twice), `answer`, `bbox`, `point` for `pointqa`. Boxes
        are x, y, x, y in pixels.
      image_root: directory of the images.
      task: `rec` asks for the box of an expression, `reg` for the expression of a box, `pointqa` about a point or box;
        of records with both, every other one about its box.
      fit: how images become square. With `pad` and `pad_white` boxes are relative to the padded image, with `square`
        to the image itself.

    Raises:
      InputError: the fit is `crop` or `anyres`, which may cut a box off; or the file can't be read.
    """

    def __init__(self, path: str | Path, image_root: str | Path, task: Task, fit: Fit):
        if fit not in ("pad", "pad_white", "square"):
            raise InputError(f"data.fit must be 'pad', 'pad_white' or 'square' for boxes, got {fit!r}")
        self._records, self._root = ColumnarRecords(path), Root(image_root)
        self._task, self._padded = task, fit != "square"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record, name = self._records[index], f"#{index}"
        image = record.get("img_path", record.get("file_path"))
        if not isinstance(image, str) or not image:
            raise LayoutError(name, "names no image", "malformed record")
        path = self._root.file(name, image)
        if self._task == "pointqa":
            # Records with a point and a box, or with several questions, take turns, so that all kinds are seen.
            places = [key for key in ("point", "bbox") if record.get(key)] or ["bbox"]
            questions = [key for key in POINT_QUESTION_KEYS if key in record] or ["question"]
            question = POINT_QUESTION.format(
                question=_text(name, record, questions[index % len(questions)]),
                place=self._place(name, path, record.get(places[index % len(places)])))
            answer = f"The answer is {_text(name, record, 'answer')} ."
        else:
            box, expression = self._place(name, path, record.get("bbox")), _text(name, record, "expression")
            question, answer = REC_QUESTION.format(expression=expression), f"Answer: {box} ."
            if self._task == "reg":
                question, answer = REG_QUESTION.format(box=box), expression
        return Sample(name, (path,), ((Turn("user", "<image>\n" + question), Turn("assistant", answer)),))

    def _place(self, record: str, path: Path, numbers: Any) -> str:
        """Returns a box or a point as Shikra writes it, from pixels."""
        if (not isinstance(numbers, list) or len(numbers) not in (2, 4)
                or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers)):
            raise LayoutError(record, f"has no box or point of numbers, got {numbers!r}", "malformed record")
        try:
            return write_place(numbers, *pixel_size(read(path), str(path)), self._padded)
        except ImageError as error:
            raise LayoutError(record, str(error), error.reason) from error


def write_place(pixels: Sequence[float], width: int, height: int, padded: bool) -> str:
    """Writes a point or a box as Shikra does: `[0.123,0.456]`, from 0 to 1, three decimals.

    Args:
      pixels: x, y or x, y, x, y.
      width: of the image, in pixels.
      height: of the image, in pixels.
      padded: coordinates are relative to the square that has the image in its middle, not to the image.
    """
    if padded:
        return box_text([to_padded_square(pixels, width, height)])
    shares = [value / (width, height)[i % 2] for i, value in enumerate(pixels)]
    return box_text([[min(max(share, 0.0), 1.0) for share in shares]])


def _text(name: str, record: dict[str, Any], key: str) -> str:
    text = record.get(key)
    if not isinstance(text, str) or not is_unicode(text):
        raise LayoutError(name, f"has no text {key}", "malformed record")
    if not text.strip():
        raise LayoutError(name, f"has an empty {key}", "empty answer")
    return text.strip()
