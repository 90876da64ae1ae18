"""Many settings of a stage on one topology: rows per device x rematerialisation policy x mesh, compiled one by one.

What cannot fit, as less did not, is not compiled. Every report is on disk as soon as it is there, and a search of the
same question that is given the same file goes on behind it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

import vocojax
from vocojax.config import ConfigError, config_to_dict, differing_keys
from vocojax.costs.steps.compiling import Unfinished
from vocojax.costs.steps.report import compile_report
from vocojax.costs.steps.tables import HEADS, line
from vocojax.costs.topologies import Topology
from vocojax.files import write_atomically
from vocojax.parallel.mesh import MeshConfig
from vocojax.training.config import StageConfig

ROWS = (1, 2, 4, 8, 16, 32)  # per device and part of a batch
# Policies, those that keep less first, with the others that keep all of what they keep on the device and more. What
# `offload` takes depends on how transfers are scheduled: nothing follows from it.
KEEP_MORE = {
    "full": ("attention_out", "minimal", "none"), "attention_out": ("none",), "minimal": ("none",), "none": (),
    "offload": (),
}  # fmt: skip

_NOTHING = {"peak_bytes": None, "estimated_seconds": None}  # of what was not compiled


@dataclass(frozen=True)
class Trial:
    """One setting: the rest is the stage's config."""

    mesh: MeshConfig
    remat: str
    rows: int
    accumulate: int

    def applied(self, config: StageConfig) -> StageConfig:
        return dataclasses.replace(config, mesh=self.mesh, remat=self.remat, accumulate=self.accumulate)

    def known(self, topology: Topology) -> dict[str, Any]:
        """What its report will say of it."""
        return {"topology": topology.name, "devices": topology.count, "remat": self.remat, "rows_per_device": self.rows,
                "accumulate": self.accumulate, "mesh": dataclasses.asdict(self.mesh)}


@dataclass
class Findings:
    """Reports so far, and the settings that were not compiled, each with its reason as `skipped`.

    path: where they are kept; None for nowhere. Those that are `unfinished` are not: they say nothing of a setting.
    question: what they answer, so that none are mixed.
    """

    path: str | None
    question: dict[str, Any]
    reports: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.path or not Path(self.path).exists():
            return
        try:
            saved = json.loads(Path(self.path).read_text())
            asked, self.reports, self.skipped = saved["question"], saved["reports"], saved["skipped"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError("json", f"must name a new file or one of a search, {self.path} is another") from None
        if changed := differing_keys(asked, self.question):
            raise ConfigError("json", f"must name a new file: {self.path} holds the answers to another question "
                              f"(differing: {', '.join(changed)[:500]})")

    def add(self, report: dict[str, Any]) -> None:
        self._no_longer_skipped(report)
        self.reports = ranked([*self.reports, report])
        self.write()

    def skip(self, trial: dict[str, Any], reason: str) -> None:
        self._no_longer_skipped(trial)
        self.skipped.append(trial | {"skipped": reason})

    def _no_longer_skipped(self, trial: dict[str, Any]) -> None:
        same = lambda other: all(trial[key] == value for key, value in other.items() if key != "skipped")
        self.skipped = [other for other in self.skipped if not same(other)]

    def write(self) -> None:
        if self.path:
            reports = [report for report in self.reports if not report.get("unfinished")]
            figures = {"question": self.question, "reports": reports, "skipped": self.skipped}
            write_atomically(self.path, json.dumps(figures, indent=2))

    def holds(self, trial: dict[str, Any]) -> bool:
        return any(all(report[key] == value for key, value in trial.items()) for report in self.reports)


def refuse_a_search(path: str) -> None:
    """Raises `ConfigError` if a file holds what a search found, which a single report would overwrite."""
    try:
        saved = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return
    if isinstance(saved, dict) and "question" in saved:
        raise ConfigError("json", f"must name another file: {path} holds a search or comparison")


def compare_remat(
    config: StageConfig, topology: Topology, policies: Sequence[str] = (), *, fast: bool = False,
    path: str | None = None,
) -> Findings:
    """The report of every rematerialisation policy, the fastest that fits first, whether the others fit or not.

    Raises:
      ConfigError: as `search`.
    """
    rows, rest = divmod(config.batch_size // config.accumulate * max(config.mesh.tensor, 1), topology.count)
    if rest:
        raise ConfigError("batch_size", f"/ accumulate must be a multiple of slice x data x fsdp on {topology.name}, "
                          f"got {config.batch_size // config.accumulate}")
    trials = [Trial(topology.whole(config.mesh), policy, rows, config.accumulate) for policy in _policies(policies)]
    findings = Findings(path, _question(config, topology, fast))
    _compile(trials, config, topology, findings, fast=fast, bounded=False)
    return findings


def search(
    config: StageConfig, topology: Topology, policies: Sequence[str] = (), rows: Sequence[str] = (),
    meshes: Sequence[str] = (), *, path: str | None = None,
) -> Findings:
    """Reports without code generation on rows per device x policy x mesh, the fastest that fits first.

    Args:
      policies, rows, meshes: those to try, all there are by default; a mesh is data x fsdp x tensor, `1x256x1`.
      path: where findings are kept, and taken up again.

    Raises:
      ConfigError: one of them is none, the batch divides over no mesh, or the file is of another question.
      CompilerError: the compiler can't be used.
    """
    findings = Findings(path, _question(config, topology, True))
    trials = []
    for mesh in [_mesh(text, topology) for text in meshes] or default_meshes(topology):
        for policy in _policies(policies):
            for count in _rows(rows):
                at_once = count * mesh.slice * mesh.data * mesh.fsdp
                trial = Trial(mesh, policy, count, config.batch_size // at_once)
                if config.batch_size % at_once:
                    findings.skip(trial.known(topology), f"batch_size {config.batch_size} is no multiple of {at_once}")
                else:
                    trials.append(trial)
    if not trials:
        raise ConfigError("batch_size", f"must be a multiple of rows x data x fsdp for some of the rows and meshes on "
                          f"the {topology.count} devices of {topology.name}, got {config.batch_size}")
    _compile(trials, config, topology, findings, fast=True, bounded=True)
    return findings


def default_meshes(topology: Topology) -> list[MeshConfig]:
    """All parameters spread over all devices of a slice, twice over half of them, and heads split in two."""
    devices = topology.count // topology.slices
    choices = [(data, tensor) for data, tensor in ((1, 1), (2, 1), (1, 2)) if devices % (data * tensor) == 0]
    return [MeshConfig(slice=topology.slices, data=data, fsdp=devices // (data * tensor), tensor=tensor)
            for data, tensor in choices]


def _policies(named: Sequence[str]) -> list[str]:
    if unknown := [name for name in named if name not in KEEP_MORE]:
        raise ConfigError("policies", f"must be some of {', '.join(KEEP_MORE)}, got {', '.join(unknown)}")
    return [policy for policy in KEEP_MORE if policy in (named or KEEP_MORE)]


def _rows(named: Sequence[str]) -> Sequence[int]:
    if not all(text.isdecimal() and int(text) for text in named):
        raise ConfigError("rows", f"must be numbers from 1 on, got {', '.join(named)}")
    return sorted(map(int, named)) or ROWS


def _mesh(text: str, topology: Topology) -> MeshConfig:
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split("x")]
    if len(sizes) != 3 or topology.slices * sizes[0] * sizes[1] * sizes[2] != topology.count:
        raise ConfigError("meshes", f"must be data x fsdp x tensor = {topology.count // topology.slices} devices of a "
                          f"slice of {topology.name}, as 1x{topology.count // topology.slices}x1, got {text!r}")
    return MeshConfig(slice=topology.slices, data=sizes[0], fsdp=sizes[1], tensor=sizes[2])


def _compile(
    trials: Sequence[Trial], config: StageConfig, topology: Topology, findings: Findings, *, fast: bool, bounded: bool
) -> None:
    tqdm.write(HEADS)
    for trial in tqdm(trials, desc="compile", unit="program", dynamic_ncols=True):
        known = trial.known(topology)
        if findings.holds(known):
            continue
        if bounded and (reason := next(_reasons(trial, findings.reports), "")):
            findings.skip(known, reason)
            continue
        try:
            report = compile_report(trial.applied(config), topology, fast=fast)
        except ConfigError as error:  # of this setting: heads that don't divide, a parameter that can't be cut
            report = _NOTHING | {"fits": False, "error": str(error)}
        except Unfinished as error:
            report = _NOTHING | {"fits": None, "error": str(error), "unfinished": True}
        findings.add(report | known)
        tqdm.write(line(report | known))
    findings.write()


def _reasons(trial: Trial, reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Why a setting cannot fit, by those that did not, or cannot be built."""
    for report in reports:
        if report["mesh"] != dataclasses.asdict(trial.mesh) or report.get("unfinished"):
            continue
        if "hbm_limit" not in report:  # there was no program to compile; rows and policies change nothing about that
            yield f"this mesh can't be built: {report['error']}"
        if not _is_too_large(report):
            continue
        kinds = report["hbm_bytes_per_device"].items()
        held = sum(size for kind, size in kinds if kind not in ("temporaries", "batch"))
        if held > report["hbm_limit"]:
            yield f"parameters and optimizer alone take {held / 1e9:.1f} GB on this mesh"
        # Where a batch is not cut, no sum of gradients is held: that may take less with more rows.
        holds_sum = trial.accumulate > 1 or report["accumulate"] == 1
        keeps = trial.remat == report["remat"] or trial.remat in KEEP_MORE[report["remat"]]
        if keeps and holds_sum and trial.rows >= report["rows_per_device"]:
            yield f"{report['remat']} with {report['rows_per_device']} rows does not fit this mesh"


def _is_too_large(report: dict[str, Any]) -> bool:
    """Whether it is for want of memory that a setting does not fit."""
    if report["peak_bytes"] is not None:
        return report["peak_bytes"] > report["hbm_limit"]
    return "hbm_limit" in report and "RESOURCE_EXHAUSTED" in report["error"]


def ranked(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest that fits first."""
    speed = lambda report: report.get("tokens_per_second_per_device") or 0.0
    return sorted(reports, key=lambda report: (not report["fits"], -speed(report)))


def _question(config: StageConfig, topology: Topology, fast: bool) -> dict[str, Any]:
    """All that a report depends on besides its trial."""
    same = dataclasses.replace(config, mesh=MeshConfig(), remat="full", accumulate=1)
    code = hashlib.sha256()
    for path in sorted(Path(vocojax.__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    compilers = {name: version for name, version in sorted(installed.items())
                 if name in ("jax", "jaxlib", "libtpu") or name.startswith("jax-cuda")}
    flags = {name: os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")}
    return {"topology": topology.name, "fast": fast, "config": config_to_dict(same), "flags": flags,
            "compilers": compilers, "code": code.hexdigest()[:16]}
