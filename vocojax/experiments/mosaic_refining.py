"""Few tokens first on the mosaics: how many VoCo tokens an elastic model reads if it asks for more only when unsure.

The threshold comes from the validation split. What it does is measured on the test split, whose canvases are new.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vocojax.experiments.mosaic_benchmark import MosaicBenchmark
from vocojax.files import write_atomically
from vocojax.inference.assistant import Assistant
from vocojax.inference.calibration import calibration_of, curve, reached, trace_questions
from vocojax.inference.refining import write_calibration

AGREEMENT = 0.99  # asked for: share of the answers that are those from all VoCo tokens


@dataclass(frozen=True)
class Refining:
    """The measurement of one model.

    Attributes:
      run: the model's run; its calibration is written beside it.
      canvases: how many of each split are asked about; None for all.
      result: the file that keeps the figures.
    """

    run: Path
    canvases: int | None
    result: Path


def measure(refining: Refining, position: int) -> None:
    """Calibrates and measures a model unless its figures are kept; `position` is the line of the progress bar."""
    del position
    if refining.result.exists():
        return
    assistant = Assistant.from_run(refining.run)
    held_out, fresh = (
        trace_questions(assistant, MosaicBenchmark(split, refining.canvases).requests(), 256, progress=None)
        for split in ("validation", "test"))
    calibration = calibration_of(assistant, held_out, AGREEMENT)
    write_calibration(refining.run, calibration)
    found = reached(fresh, calibration.levels, calibration.threshold)
    points = [point for _, point in curve(fresh, calibration.levels)]
    figures = {"threshold": calibration.threshold, "questions": len(fresh), **found._asdict(),
               "curve": [[point.mean_tokens, point.agreement] for point in points]}
    refining.result.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(refining.result, json.dumps(figures) + "\n")


def of_seeds(results: Sequence[Path]) -> dict[str, Any]:
    """Returns the figures of every seed: `asked_for`, and of each of `measure`'s entries a list."""
    found = [json.loads(result.read_text()) for result in results]
    return {"asked_for": AGREEMENT, **{key: [each[key] for each in found] for key in found[0]}}
