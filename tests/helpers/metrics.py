"""The lines of a run's metrics.jsonl, for tests."""

import json
from pathlib import Path

OF_A_STEP = ("step", "loss", "cross_entropy", "kl", "accuracy", "grad_norm", "update_norm", "learning_rate", "targets",
             "tokens")


def lines(workdir: Path) -> list[dict[str, float]]:
    """Returns all lines."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def of_steps(workdir: Path) -> list[dict[str, float]]:
    """Returns the lines with what the steps alone computed: no times, and nothing that was measured between them."""
    return [{name: line[name] for name in OF_A_STEP if name in line} for line in lines(workdir)]
