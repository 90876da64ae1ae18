"""Configs of runs that earlier versions wrote, in today's keys. Every change of a key has its place here."""

from collections.abc import Mapping
from typing import Any


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's saved config in today's keys; one that has them already is returned as it is.

    Args:
      config: what config.json holds, or the part of it that a checkpoint keeps. Any key may be missing.
    """
    values = dict(config)
    if "train" in values:  # version 0.1: two lists of regexes, of which exactly one matched each parameter
        trained, frozen = values.pop("train"), values.pop("freeze", [])
        values["learning_rates"] = [[regex, 1.0] for regex in trained] + [[regex, "freeze"] for regex in frozen]
    if "lanes" in values.get("data", {}):
        values["data"] = {"packers" if key == "lanes" else key: value for key, value in values["data"].items()}
    return values
