"""Reports as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vocojax.costs.prices import costs_line

GB = 1e9
LEGEND = """\
How to read it
memory       bytes on one device; the lines below it add up to it. "temporaries" are all that a step needs besides what
             it is given: activations, gradients, gathered layers. "averages" are those of optimizer.ema
step         compute + attention + interconnect + between_slices. In no sum: hidden_interconnect (collectives that run
             while the device computes) and hbm_traffic (what it would take only to move that many bytes)
by part      the same seconds as "step", by part of the model; a wait for a collective counts for the part that waits
collectives  bytes of the whole arrays that one device gathers or sums in a step, inside its slice; those "hidden by
             nothing" are a part of them
MFU bound    model FLOPs, without what rematerialisation repeats, over the chip's peak in the step's seconds
tokens/s     of rows counted as full, padding included; "the decoder alone" leaves the vision tower's seconds out
head, vision chunks of target slots and of images; a step runs those that are filled, and only these are priced
products     FLOPs of all matrix products of one device, repeated ones included, without those inside the kernels
run          steps times the step's seconds. In no sum: compiling, waiting for data, validation, the last checkpoint"""
COLUMNS = """\
mesh: its axes longer than 1; rows: parts of a batch x rows per device and part; peak GB: on one device; fits: in what
the compiler leaves to a program; s/step: estimated, by a roofline with --fast; tokens/s: per device, rows counted as
full; MFU: model FLOPs over the peak in that time, at best. The fastest setting is the cheapest one"""


def table(report: dict[str, Any]) -> str:
    """Returns everything that one report says, and how to read it."""
    lines = [f"{report['topology']}: {report['devices']} x {report['device_kind']}, {_mesh(report)}, remat "
             f"{report['remat']}, {report['accumulate']} x {report['rows_per_device']} rows per device, "
             f"{report['tokens_per_device']:,} tokens per device and step"]
    if report["peak_bytes"] is not None:
        lines.append(f"memory      {report['peak_bytes'] / GB:8.2f} GB of {report['hbm_limit'] / GB:.2f} GB: "
                     f"{'fits' if report['fits'] else 'DOES NOT FIT'}")
    lines += [f"    {kind:24} {size / GB:8.3f} GB" for kind, size in report["hbm_bytes_per_device"].items()]
    if report["error"]:
        lines.append(f"the compiler gave up: {report['error']}")
    if report["estimated_seconds"] is None:
        return "\n".join(lines)
    lines.append(f"step        {report['estimated_seconds']:8.3f} s, by {report['estimated_from']}; MFU bound "
                 f"{report['mfu_bound']:.1%}; {report['tokens_per_second_per_device']:,.0f} tokens/s per device, the "
                 f"decoder alone {report['decoder_tokens_per_second_per_device']:,.0f} (rows counted as full)")
    lines += [f"    {what:24} {seconds:8.3f} s" for what, seconds in report["seconds"].items()]
    lines.append("by part")
    lines += [f"    {scope:24} {seconds:8.3f} s" for scope, seconds in report["scope_seconds"].items()]
    lines.append("collectives     bytes    of them hidden by nothing")
    for kind, size in report["collective_bytes"].items():
        lines.append(f"    {kind:24} {size / GB:8.2f} GB {report['synchronous_bytes'].get(kind, 0) / GB:8.2f} GB")
    lines += [f"    {kind + ', between slices':24} {size / GB:8.2f} GB {size / GB:8.2f} GB"
              for kind, size in report["between_slices_bytes"].items()]
    lines.append(f"head        {report['head_chunks']:8} of {report['target_chunks']} chunks of target slots: those "
                 "that typical rows fill")
    lines.append(f"vision      {report['image_chunks']:8} of {report['slot_chunks']} chunks of images: those that "
                 "typical rows fill")
    traffic = report["hbm_traffic_bytes"] / GB
    lines.append(f"products    {report['flops'] / 1e12:8.1f} TFLOP, HBM traffic {traffic:.0f} GB")
    compiler = report["compiler"]
    if compiler["cpu_seconds"]:
        lines.append(f"compiled in {compiler['cpu_seconds']:.0f} CPU-seconds and {compiler['memory_gib']:.1f} GiB")
    if report.get("run"):
        lines.append(f"run         {costs_line(report['run'])}")
    return "\n".join([*lines, "", LEGEND])


HEADS = (f"{'mesh':30} {'remat':14} {'rows':>9} {'peak GB':>8} {'fits':>5} {'s/step':>8} {'tokens/s':>9} {'MFU':>6}")


def line(report: dict[str, Any]) -> str:
    """Returns one report as a line under `HEADS`, with what the compiler said if it failed."""
    rows = f"{report['accumulate']} x {report['rows_per_device']}"
    peak = "-" if report["peak_bytes"] is None else f"{report['peak_bytes'] / GB:.2f}"
    speed = f"{'-':>8} {'-':>9} {'-':>6}" if report["estimated_seconds"] is None else (
        f"{report['estimated_seconds']:8.3f} {report['tokens_per_second_per_device']:9,.0f} "
        f"{report['mfu_bound']:6.1%}")
    fits = {True: "yes", False: "no", None: "-"}[report["fits"]]
    said = f"\n    {report['error']}" if report["error"] else ""
    return f"{_mesh(report):30} {report['remat']:14} {rows:>9} {peak:>8} {fits:>5} {speed}{said}"


def comparison(reports: Sequence[dict[str, Any]], skipped: Sequence[dict[str, Any]] = ()) -> str:
    """Returns one line per report, then what was not compiled, by reason, and what the columns are."""
    lines = [HEADS, *map(line, reports)]
    reasons: dict[str, list[str]] = {}
    for trial in skipped:
        name = f"{_mesh(trial)}, {trial['remat']}, {trial['rows_per_device']} rows"
        reasons.setdefault(trial["skipped"], []).append(name)
    lines += [f"not tried, as {reason}: {'; '.join(names)}" for reason, names in reasons.items()]
    return "\n".join([*lines, "", COLUMNS])


def _mesh(report: dict[str, Any]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1) or "one device"
