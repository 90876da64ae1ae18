"""The report about time: accuracy by type of question, film strips of clips with every row's answers, loss curves."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vocojax.data.sources.easy_vqa import Question
from vocojax.evaluation.report import answer_cells, draw_losses, inline_image, picture, write_page
from vocojax.evaluation.retention import percent


@dataclass(frozen=True)
class Strip:
    """A clip with some questions.

    Attributes:
      images: the image file of each frame, in their order.
      asked: questions, and each row's answer by its name.
    """

    images: Sequence[Path]
    asked: Sequence[tuple[Question, Mapping[str, str]]]


def write_report(
    path: str | Path,
    result: Mapping[str, Any],
    losses: Mapping[str, Sequence[tuple[int, float]]],
    strips: Sequence[Strip],
    versions: Mapping[str, str],
) -> None:
    """Writes the page.

    Args:
      path: of the file.
      result: the content of video.json.
      losses: (step, loss) of every step of each run shown, by its name.
      strips: clips with answers.
      versions: of the packages that the run used, by their names.
    """
    rows = result["rows"]
    lengths = next(iter(rows.values()))["by_frames"]
    body = [
        "<h1>vocojax quickstart: time</h1>",
        f"<p class=note>Clips of easy-VQA's {html.escape(result['split'])} images, {result['questions']:,} questions; "
        f"seeds {', '.join(map(str, result['seeds']))}; {result['seconds']['total']:.0f} s of work.</p>",
        "<h2>Accuracy by type of question</h2>", _table({name: _figures(row) for name, row in rows.items()}),
        f"<p class=note>Means over clips of all lengths and over seeds. The order of frames decides the answers of: "
        f"{html.escape(', '.join(result['ordered_types']))}.</p>",
    ]
    for number in lengths:
        body += [f"<h2>Clips of {number} frames</h2>",
                 _table({name: _figures(row["by_frames"][number]) for name, row in rows.items()})]
    body += ["<h2>Clips and answers</h2>", *map(_strip, strips),
             "<h2>Training</h2>", picture(draw_losses(losses), "loss curves")]
    write_page(path, "vocojax quickstart: time", body, versions)


def _figures(scores: Mapping[str, Any]) -> dict[str, float]:
    return {"accuracy": scores["accuracy"], **scores["by_type"]}


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    head = "".join(f"<th>{html.escape(column)}" for column in ("model", *columns))
    lines = [f"<tr><td>{html.escape(name)}{''.join(f'<td>{percent(row[column])}' for column in columns)}"
             for name, row in rows.items()]
    return f"<table><tr>{head}{''.join(lines)}</table>"


def _strip(strip: Strip) -> str:
    """Returns a clip's frames in a row, and below them its questions with all answers."""
    names = list(strip.asked[0][1])
    head = "".join(f"<th>{html.escape(name)}" for name in ("question", "gold", *names))
    lines = [f"<tr><td>{html.escape(question.text)}<td>{html.escape(question.answer)}"
             f"{answer_cells(answers, question.answer)}" for question, answers in strip.asked]
    return (f"<p class='text strip'>{''.join(map(inline_image, strip.images))}</p>"
            f"<table class=text><tr>{head}{''.join(lines)}</table>")
