"""The quickstart's report, and what its reports share: self-contained HTML pages with pictures inline."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vocojax.evaluation.retention import percent
from vocojax.files import write_atomically
from vocojax.layout import Role, SampleLayout

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid #dde2ea; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
.text img { image-rendering: pixelated; width: 64px; height: 64px; vertical-align: middle; }
.strip img { width: 32px; height: 32px; margin: 1px; }
.right { color: #11703c; } .wrong { color: #b3261e; } .note { color: #5a6475; } figure { margin: 1rem 0; }
figure img { max-width: 100%; }
"""
# Colours of a visible pair, by the role of its key.
ROLE_COLOURS = {
    Role.BOS: "#8c96a8", Role.VISION: "#7fb2e5", Role.NEWLINE: "#c3cad6", Role.VOCO: "#e4572e", Role.TEXT: "#3c9d6b"
}


@dataclass(frozen=True)
class Example:
    """A test image with a question and its answers.

    Attributes:
      image: its file.
      question: about the image.
      gold: the correct answer.
      answers: each model's answer, by its name.
    """

    image: Path
    question: str
    gold: str
    answers: Mapping[str, str]


def loss_curve(workdir: str | Path) -> list[tuple[int, float]]:
    """Reads (step, loss) of every step of a run from its metrics.jsonl."""
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


def draw_losses(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Draws the loss over steps, a line per run, smoothed over a fiftieth of its steps."""
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for name, curve in curves.items():
        steps, losses = np.array(curve).T
        window = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per target)", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_mask(sample: SampleLayout) -> Figure:
    """Draws who sees whom in one sample: with the VoCo mask, and in the upper bound."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    colours = ListedColormap(["white", *ROLE_COLOURS.values()])
    paint = {role: i + 1 for i, role in enumerate(ROLE_COLOURS)}
    key_colour = np.array([paint[Role(role)] for role in sample.roles])
    index = np.arange(len(sample))
    for axes, visibility, title in zip(panels, ("voco", "causal"), ("VoCo mask", "upper bound"), strict=True):
        view = sample.view(visibility)  # type: ignore[arg-type]
        sees = (view.start[:, None] <= index) & (index <= index[:, None]) & (index[:, None] < view.stop)
        axes.imshow(np.where(sees, key_colour, 0), cmap=colours, vmin=0, vmax=len(paint), interpolation="nearest")
        axes.set(title=title, xlabel="key (seen)", ylabel="query (sees)")
    names = [Patch(color=colour, label=role.name.lower()) for role, colour in ROLE_COLOURS.items()]
    figure.legend(handles=names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def write_report(
    path: str | Path,
    result: Mapping[str, Any],
    losses: Figure,
    mask: Figure,
    examples: Sequence[Example],
    versions: Mapping[str, str],
) -> None:
    """Writes the page.

    Args:
      path: of the file.
      result: the content of retention.json.
      losses: from `draw_losses`.
      mask: from `draw_mask`.
      examples: test images with answers.
      versions: of the packages that the run used, by their names.
    """
    two_stage, tokens = result["two_stage"], result["vision_tokens"]
    body = [
        "<h1>vocojax quickstart</h1>",
        f"<p class=note>easy-VQA test split; {tokens} vision tokens per image; seeds "
        f"{', '.join(map(str, result['seeds']))}; {result['seconds']['total']:.0f} s of work.</p>",
        "<h2>Retention</h2>", _retention_table(result["rows"]),
        "<p class=note>retention = (accuracy − lower bound) / (upper bound − lower bound). The upper bound reads all "
        "vision tokens; the lower bound is the same model read through the VoCo mask it was not trained for.</p>",
        "<h2>Compress once, read many times</h2>",
        f"<p>{two_stage['identical_answers']:,} of {two_stage['questions']:,} answers from a VoCo cache are those of a "
        f"single pass; the largest difference of a logit is {two_stage['max_abs_logit_diff']:.1e}.</p>",
        "<h2>Who sees whom</h2>", picture(mask, "attention mask of one sample"),
        "<h2>Training</h2>", picture(losses, "loss curves"),
        "<h2>Answers</h2>", _examples_table(examples),
    ]
    write_page(path, "vocojax quickstart", body, versions)


def write_page(path: str | Path, title: str, body: Sequence[str], versions: Mapping[str, str]) -> None:
    """Writes a page.

    Args:
      path: of the file.
      title: of the page.
      body: its parts, in HTML.
      versions: of the packages that the run used, by their names; they are the last line.
    """
    used = ", ".join(f"{html.escape(name)} {html.escape(version)}" for name, version in versions.items())
    write_atomically(path, f"<!doctype html><html lang=en><meta charset=utf-8>"
                     f"<meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
                     f"<style>{STYLE}</style><body>{''.join(body)}<p class=note>{used}</p></body></html>\n")


def _retention_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    kinds = list(next(iter(rows.values()))["accuracy_by_question_type"])
    head = "".join(f"<th>{html.escape(c)}" for c in ("model", "accuracy", *kinds, "retention"))
    lines = []
    for name, row in rows.items():
        figures = [row["accuracy"], *(row["accuracy_by_question_type"][kind] for kind in kinds), row["retention"]]
        lines.append(f"<tr><td>{html.escape(name)}{''.join(f'<td>{percent(figure)}' for figure in figures)}")
    return f"<table><tr>{head}{''.join(lines)}</table>"


def _examples_table(examples: Sequence[Example]) -> str:
    models = list(examples[0].answers) if examples else []
    head = "".join(f"<th>{html.escape(c)}" for c in ("", "question", "gold", *models))
    lines = []
    for example in examples:
        lines.append(f"<tr><td>{inline_image(example.image)}<td>{html.escape(example.question)}"
                     f"<td>{html.escape(example.gold)}{answer_cells(example.answers, example.gold)}")
    return f"<table class=text><tr>{head}{''.join(lines)}</table>"


def answer_cells(answers: Mapping[str, str], gold: str) -> str:
    """Returns a table cell for each answer, coloured by whether it is right."""
    return "".join(f"<td class={'right' if answer == gold else 'wrong'}>{html.escape(answer) or '(nothing)'}"
                   for answer in answers.values())


def inline_image(file: Path) -> str:
    """Returns a PNG file as an image element that holds its content."""
    return f"<img alt='test image' src='data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}'>"


def picture(figure: Figure, description: str) -> str:
    """Returns a figure as an element that holds it, and closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    source = base64.b64encode(buffer.getvalue()).decode()
    return f"<figure><img alt='{description}' src='data:image/png;base64,{source}'></figure>"
