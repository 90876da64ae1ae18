"""The page about the mosaics: retention over N, question types, recipes, masks and the worst answers."""

import html
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from vocojax.evaluation import report
from vocojax.evaluation.retention import percent
from vocojax.experiments.mosaic_tables import SeedRow, mean
from vocojax.layout import SampleLayout


def draw_retention(curves: Mapping[str, Mapping[int, SeedRow]]) -> Figure:
    """Draws retention over the number of VoCo tokens, a line per way of training, with each seed as a point.

    Args:
      curves: rows by their number of VoCo tokens, for each way.
    """
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for name, rows in curves.items():
        line = axes.plot(list(rows), [100 * (mean(row["retention"]) or 0) for row in rows.values()], label=name)[0]
        for number, row in rows.items():
            kept = [100 * value for value in row["retention"] if value is not None]
            axes.plot([number] * len(kept), kept, "o", color=line.get_color(), markersize=3)
    numbers = sorted({number for rows in curves.values() for number in rows})
    axes.set(xlabel="VoCo tokens", ylabel="retention (%)", xscale="log")
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_refining(refining: Mapping[str, Any]) -> Figure:
    """Draws the agreement with all VoCo tokens over the mean number that is read, a line per seed.

    Args:
      refining: from `mosaic_refining.of_seeds`; the cross is what the calibrated threshold does.
    """
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for seed, points in enumerate(refining["curve"]):
        line = axes.plot(*zip(*((tokens, 100 * share) for tokens, share in points), strict=True), ".-",
                         label=f"seed {seed}")[0]
        axes.plot(refining["mean_tokens"][seed], 100 * refining["agreement"][seed], "x", color=line.get_color(),
                  markersize=9)
    axes.axhline(100 * refining["asked_for"], color="grey", linewidth=0.8)
    axes.set(xlabel="VoCo tokens read, mean", ylabel="same answer as from all (%)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def rows_table(rows: Mapping[str, SeedRow]) -> str:
    """Returns a table of rows in HTML: mean, spread, each seed, each type of question, retention in both forms."""
    kinds = list(next(iter(rows.values()))["by_type"])
    head = ("model", "accuracy", "spread", "each seed", *kinds, "retention", "of upper")
    lines = [f"<tr>{''.join(f'<th>{html.escape(name)}' for name in head)}"]
    for name, row in rows.items():
        cells = [percent(mean(row["accuracy"])), percent(statistics.pstdev(row["accuracy"])),
                 " ".join(f"{100 * value:.1f}" for value in row["accuracy"]),
                 *(percent(mean(row["by_type"][kind])) for kind in kinds),
                 percent(mean(row["retention"])), percent(mean(row["of_upper"]))]
        lines.append(f"<tr><td>{html.escape(name)}{''.join(f'<td>{cell}' for cell in cells)}")
    return f"<table>{''.join(lines)}</table>"


def worst(golds: Sequence[str], answers: Mapping[str, Sequence[str]], right: str, wrong: str, count: int) -> list[int]:
    """Returns the first questions that one model answers and another does not.

    Args:
      golds: correct answers.
      answers: of every model, in the same order.
      right: the model that answers.
      wrong: the model that does not.
      count: the most.
    """
    found = [index for index, gold in enumerate(golds)
             if answers[right][index] == gold and answers[wrong][index] != gold]
    return found[:count]


def write_mosaic_report(
    path: Path, result: Mapping[str, Any], curves: Mapping[str, Mapping[int, SeedRow]], sample: SampleLayout,
    examples: Sequence[report.Example], versions: Mapping[str, str],
) -> None:
    """Writes the page.

    Args:
      path: of the file.
      result: the content of tables.json.
      curves: see `draw_retention`.
      sample: whose mask is drawn.
      examples: questions that only the upper bound answers.
      versions: of the packages that were used.
    """
    head = "".join(f"<th>{html.escape(name)}" for name in ("", "question", "gold", *examples[0].answers)) if (
        examples) else ""
    answers = "".join(
        f"<tr><td>{report.inline_image(example.image)}<td>{html.escape(example.question)}<td>"
        f"{html.escape(example.gold)}{report.answer_cells(example.answers, example.gold)}" for example in examples)
    elastic = ["<h2>Trained with 8 VoCo tokens, read with fewer</h2>", rows_table(result["table_4"])] if (
        result["table_4"]) else []
    refining = ["<h2>Few tokens first, more where the answer is unsure</h2>",
                report.picture(draw_refining(result["refining"]), "agreement over tokens read"),
                f"<p class=note>The crosses are what the threshold does that was calibrated on the validation split "
                f"for {100 * result['refining']['asked_for']:g} % of agreement (the line).</p>"] if (
        result["refining"]) else []
    report.write_page(path, "vocojax mosaics", [
        "<h1>Mosaics</h1>",
        f"<p class=note>{result['questions']:,} questions of the {result['split']} split; "
        f"{result['bits_per_image']:.1f} bits and {result['vision_tokens']} vision tokens per image; seeds "
        f"{', '.join(map(str, result['seeds']))}.</p>",
        "<h2>Accuracy and retention</h2>", rows_table(result["rows"]),
        "<p class=note>retention = (accuracy − lower bound) / (upper bound − lower bound); of upper = accuracy / upper "
        "bound. Means over the seeds; the spread is their standard deviation.</p>",
        "<h2>Retention over the number of VoCo tokens</h2>", report.picture(draw_retention(curves), "retention over N"),
        *elastic, *refining,
        "<h2>Who sees whom</h2>", report.picture(report.draw_mask(sample), "attention mask of one sample"),
        "<h2>Answered by the upper bound only</h2>", f"<table class=text><tr>{head}{answers}</table>",
    ], versions)
