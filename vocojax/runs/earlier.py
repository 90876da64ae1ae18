"""Configs and metrics of runs that earlier versions wrote, with today's names. Every change of a name belongs here."""

from collections.abc import Mapping
from typing import Any

METRICS = {"validation_loss": "validation/loss", "validation_accuracy": "validation/accuracy"}


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's saved config with today's keys.

    Args:
      config: content of config.json, or the part of it that a checkpoint holds. Any key may be missing.
    """
    values = dict(config)
    if "train" in values:  # version 0.1: two lists of regexes, of which exactly one matched each parameter
        trained, frozen = values.pop("train"), values.pop("freeze", [])
        values["learning_rates"] = [[regex, 1.0] for regex in trained] + [[regex, "freeze"] for regex in frozen]
    if "lanes" in values.get("data", {}):
        values["data"] = {"packers" if key == "lanes" else key: value for key, value in values["data"].items()}
    if (best := values.get("checkpoint", {}).get("best_metric")) in METRICS:
        values["checkpoint"] = {**values["checkpoint"], "best_metric": METRICS[best]}
    return values


def upgraded_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns a run's saved metrics with today's names."""
    return {METRICS.get(name, name): value for name, value in metrics.items()}
