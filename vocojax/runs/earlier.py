"""Configs of runs that earlier versions wrote, converted to today's keys. Every change of a key belongs here."""

from collections.abc import Mapping
from typing import Any


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
    return values
