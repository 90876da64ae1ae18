"""Many settings of a stage on one topology: rows per device x rematerialisation policy x mesh, compiled one by one.

A setting that cannot fit, because one that needs less did not, is not compiled. Every report is written to disk at
once. The same search with the same file resumes from there.
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
# Policies in the order of what they keep, and for each the policies that keep all of it on the device and more. The
# memory of `offload` depends on how transfers are scheduled, so nothing follows from it for others.
KEEP_MORE = {
    "full": ("attention_out", "minimal", "none"), "attention_out": ("none",), "minimal": ("none",), "none": (),
    "offload": (),
}  # fmt: skip

_NOTHING = {"peak_bytes": None, "estimated_seconds": None}  # figures of a setting that was not compiled


@dataclass(frozen=True)
class Trial:
    """One setting; the stage's config has the rest.

    Attributes:
      mesh: without -1.
      remat: rematerialisation policy.
      rows: per device and part of a batch.
      accumulate: parts of a batch.
    """

    mesh: MeshConfig
    remat: str
    rows: int
    accumulate: int

    def applied(self, config: StageConfig) -> StageConfig:
        """Returns the stage's config with this setting."""
        return dataclasses.replace(config, mesh=self.mesh, remat=self.remat, accumulate=self.accumulate)

    def known(self, topology: Topology) -> dict[str, Any]:
        """Returns the keys of its report that are known before it is compiled."""
        return {"topology": topology.name, "devices": topology.count, "remat": self.remat, "rows_per_device": self.rows,
                "accumulate": self.accumulate, "mesh": dataclasses.asdict(self.mesh)}


@dataclass
class Findings:
    """The results of a search so far.

    Attributes:
      path: the file that keeps them; None for none. Reports that are `unfinished` are not kept, because they say
        nothing about a setting.
      question: what was searched, so that results of different searches are not mixed.
      reports: of settings that were compiled, the fastest that fits first.
      skipped: settings that were not compiled, each with its reason as `skipped`.
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
        """Adds a report and writes the file."""
        self._no_longer_skipped(report)
        self.reports = ranked([*self.reports, report])
        self.write()

    def skip(self, trial: dict[str, Any], reason: str) -> None:
        """Adds a setting that is not compiled."""
        self._no_longer_skipped(trial)
        self.skipped.append(trial | {"skipped": reason})

    def _no_longer_skipped(self, trial: dict[str, Any]) -> None:
        same = lambda other: all(trial[key] == value for key, value in other.items() if key != "skipped")
        self.skipped = [other for other in self.skipped if not same(other)]

    def write(self) -> None:
        """Writes the file."""
        if self.path:
            reports = [report for report in self.reports if not report.get("unfinished")]
            figures = {"question": self.question, "reports": reports, "skipped": self.skipped}
            write_atomically(self.path, json.dumps(figures, indent=2))

    def holds(self, trial: dict[str, Any]) -> bool:
        """Returns whether there is a report on a setting."""
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
    """Reports on every rematerialisation policy, the fastest that fits first, whether the others fit or not.

    Args:
      config: the stage.
      topology: the machine.
      policies: those to compare, by default all.
      fast: see `compile_step`.
      path: the file that keeps the results, and that is resumed from.

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
      config: the stage.
      topology: the machine.
      policies: those to try, by default all.
      rows: per device, those to try, by default `ROWS`.
      meshes: those to try, as data x fsdp x tensor (`1x256x1`), by default `default_meshes`.
      path: the file that keeps the results, and that is resumed from.

    Raises:
      ConfigError: one of these can't be read, the batch divides over no mesh, or the file is of another search.
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
    """Returns three meshes: parameters in parts on all devices of a slice, twice on half of them, or heads in two."""
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
        except ConfigError as error:  # about this setting: heads that don't divide, a parameter that can't be cut
            report = _NOTHING | {"fits": False, "error": str(error)}
        except Unfinished as error:
            report = _NOTHING | {"fits": None, "error": str(error), "unfinished": True}
        findings.add(report | known)
        tqdm.write(line(report | known))
    findings.write()


def _reasons(trial: Trial, reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yields reasons why a setting cannot fit, or be built, from the reports of others."""
    for report in reports:
        if report["mesh"] != dataclasses.asdict(trial.mesh) or report.get("unfinished"):
            continue
        if "hbm_limit" not in report:  # there was no program to compile, with any rows and policy
            yield f"this mesh can't be built: {report['error']}"
        if not _is_too_large(report):
            continue
        kinds = report["hbm_bytes_per_device"].items()
        held = sum(size for kind, size in kinds if kind not in ("temporaries", "batch"))
        if held > report["hbm_limit"]:
            yield f"parameters and optimizer already take {held / 1e9:.1f} GB on this mesh"
        # A batch that is not cut needs no sum of gradients, so more rows may take less memory.
        holds_sum = trial.accumulate > 1 or report["accumulate"] == 1
        keeps = trial.remat == report["remat"] or trial.remat in KEEP_MORE[report["remat"]]
        if keeps and holds_sum and trial.rows >= report["rows_per_device"]:
            yield f"{report['remat']} with {report['rows_per_device']} rows does not fit this mesh"


def _is_too_large(report: dict[str, Any]) -> bool:
    """Returns whether a setting does not fit because it needs too much memory."""
    if report["peak_bytes"] is not None:
        return report["peak_bytes"] > report["hbm_limit"]
    return "hbm_limit" in report and "RESOURCE_EXHAUSTED" in report["error"]


def ranked(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorts reports, the fastest that fits first."""
    speed = lambda report: report.get("tokens_per_second_per_device") or 0.0
    return sorted(reports, key=lambda report: (not report["fits"], -speed(report)))


def _question(config: StageConfig, topology: Topology, fast: bool) -> dict[str, Any]:
    """Returns all that a report depends on besides its setting."""
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
