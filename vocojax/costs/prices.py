"""Hours and dollars of a run, from the seconds of its step."""

from __future__ import annotations

from typing import Any


def run_costs(report: dict[str, Any], steps: int, price: float = 0.0) -> dict[str, float]:
    """Returns the entry `run` of a report: what all of a stage's steps take. {} where the step's seconds are unknown.

    Args:
      report: from `steps.report.compile_report`.
      steps: of the stage.
      price: dollars per chip and hour; 0 if it is not known.

    Returns:
      steps and hours; with a price also dollars_per_chip_hour, dollars_per_hour (of all chips) and dollars.
    """
    if report["estimated_seconds"] is None:
        return {}
    hours = steps * report["estimated_seconds"] / 3600
    costs = {"steps": steps, "hours": hours}
    if price:
        hourly = price * report["devices"]
        costs |= {"dollars_per_chip_hour": price, "dollars_per_hour": hourly, "dollars": hourly * hours}
    return costs


def costs_line(run: dict[str, float]) -> str:
    """Returns the entry `run` as text."""
    text = f"{run['hours']:,.3g} hours for {run['steps']:,} steps"
    if "dollars" not in run:
        return f"{text}; --price=DOLLARS (per chip and hour) adds the cost"
    return (f"{text}; ${run['dollars_per_hour']:,.2f} per hour at ${run['dollars_per_chip_hour']:g} per chip and hour: "
            f"${run['dollars']:,.2f} in all")
