"""Searches over settings, with a stand-in for the compiler."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.helpers.stages import load_for_a_pod
from vocojax.config import ConfigError
from vocojax.costs.steps.compiling import Unfinished
from vocojax.costs.steps.search import compare_remat, search
from vocojax.costs.steps.tables import comparison
from vocojax.costs.topologies import Topology
from vocojax.parallel.mesh import MeshConfig


class Compiler:
    """In place of XLA: 4 GB of parameters, a policy's memory per row, 3 GB for the sum of a cut batch's gradients."""

    def __init__(self, limit: float = 16):
        self.limit, self.asked = limit, []
        self.per_row = {"full": 1, "attention_out": 2, "minimal": 6, "none": 9, "offload": 1}

    def __call__(self, config, topology, fast=False):
        rows = config.batch_size // config.accumulate // (config.mesh.data * config.mesh.fsdp)
        self.asked.append((config.mesh.data, config.mesh.tensor, config.remat, rows))
        if config.mesh.tensor > 1:
            raise ConfigError("heads", "must divide")
        peak = 4 + rows * self.per_row[config.remat] + 3 * (config.accumulate > 1)
        return {"fits": peak <= self.limit, "peak_bytes": peak, "hbm_limit": self.limit, "error": "", "mfu_bound": 0.5,
                "hbm_bytes_per_device": {"parameters": 4, "temporaries": peak - 4}, "estimated_seconds": 1.0,
                "tokens_per_second_per_device": 100.0 * rows}


@pytest.fixture
def compiler(monkeypatch) -> Compiler:
    compiler = Compiler()
    monkeypatch.setattr("vocojax.costs.steps.search.compile_report", compiler)
    return compiler


def test_a_search_leaves_out_what_cannot_fit(compiler, capsys):
    """On one mesh of 4 devices, 32 rows: 8 per device in one go take no sum of gradients, so they are tried although 4
    don't fit; a policy that keeps more than one that did not fit is not."""
    found = search(load_for_a_pod("voco", batch_size=32), Topology("v5e:2x2"), meshes=["1x4x1"])
    tried = {policy: [rows for *_, name, rows in compiler.asked if name == policy] for policy in compiler.per_row}
    assert tried == {"full": [1, 2, 4, 8], "attention_out": [1, 2, 4, 8], "minimal": [1, 2, 8], "none": [1],
                     "offload": [1, 2, 4, 8]}
    best = found.reports[0]
    assert best["fits"] and best["rows_per_device"] == 8 and best["remat"] in ("full", "offload")
    reasons = {(trial["remat"], trial["rows_per_device"]): trial["skipped"] for trial in found.skipped}
    assert reasons["minimal", 4] == reasons["none", 4] == "minimal with 2 rows does not fit this mesh"
    assert reasons["full", 16] == "batch_size 32 is no multiple of 64"
    said = comparison(found.reports, found.skipped)
    assert "not tried, as batch_size 32 is no multiple of 64: fsdp 4, full, 16 rows" in said
    assert capsys.readouterr().out.count("fsdp 4") == len(compiler.asked)


def test_a_search_goes_on_where_it_was_ended(compiler, monkeypatch, tmp_path):
    """Errors of a setting are kept and listed; another question's file is refused; narrower searches add to a file."""
    path = str(tmp_path / "search.json")
    stage, topology = load_for_a_pod("voco", batch_size=32), Topology("v5e:2x2")
    run = lambda stage=stage, **space: search(stage, topology, path=path, **space)
    with monkeypatch.context() as patch:
        broken = lambda *_, **__: compiler(*_, **__) if len(compiler.asked) < 3 else (_ for _ in ()).throw(OSError)
        patch.setattr("vocojax.costs.steps.search.compile_report", broken)
        with pytest.raises(OSError):
            run(policies=["full"])
    assert len(json.loads(Path(path).read_text())["reports"]) == 3
    found = run(policies=["full"])
    assert len(compiler.asked) == len(set(compiler.asked)) == len(found.reports) == 4 + 4 + 1
    (failed,) = [report for report in found.reports if report["error"]]
    assert failed["mesh"]["tensor"] == 2 and "heads must divide" in comparison([failed])
    assert found.skipped[-1]["skipped"] == "this mesh can't be built: heads must divide"
    narrower = run(policies=["offload"], rows=["2"], meshes=["2x2x1"])
    assert len(narrower.reports) == 10 and narrower.skipped == found.skipped
    assert json.loads(Path(path).read_text())["skipped"] == found.skipped == run(policies=["full"]).skipped
    before = Path(path).read_text()
    with pytest.raises(ConfigError, match=r"another question \(differing: config.seed\)"):
        run(dataclasses.replace(stage, seed=1))
    assert Path(path).read_text() == before
    Path(path).write_text("[]")
    with pytest.raises(ConfigError, match="must name a new file or one of a search"):
        run()


def test_a_comparison_compiles_what_a_search_left_out(compiler, tmp_path):
    path, topology = str(tmp_path / "search.json"), Topology("v5e:2x2")
    stage = dataclasses.replace(load_for_a_pod("voco", batch_size=32), accumulate=4, mesh=MeshConfig(data=1, fsdp=-1))
    found = search(stage, topology, ["minimal", "none"], ["1", "2"], ["1x4x1"], path=path)
    assert [trial["remat"] for trial in found.skipped] == ["none"]
    found = compare_remat(stage, topology, ["none"], fast=True, path=path)
    assert len(found.reports) == len(set(compiler.asked)) == len(compiler.asked) == 4 and not found.skipped


def test_a_compiler_that_was_killed_says_nothing_of_a_setting(compiler, monkeypatch, tmp_path):
    """Its report is shown; it rules nothing out and is not kept: the same command asks again."""
    path = tmp_path / "search.json"
    run = lambda: search(load_for_a_pod("voco", batch_size=32), Topology("v5e:2x2"), ["full", "minimal"], ["1", "2"],
                         ["1x4x1"], path=str(path))

    def killed(config, topology, fast=False):
        if config.remat == "full" and config.accumulate == 8:
            raise Unfinished("the compiler was killed by signal 9")
        return compiler(config, topology, fast)

    with monkeypatch.context() as patch:
        patch.setattr("vocojax.costs.steps.search.compile_report", killed)
        found = run()
    assert len(found.reports) == 4 and not found.skipped
    assert "   -        -         -      -\n    the compiler was killed by signal 9" in comparison(found.reports)
    assert len(json.loads(path.read_text())["reports"]) == len(compiler.asked) == 3
    run()
    assert len(json.loads(path.read_text())["reports"]) == len(set(compiler.asked)) == len(compiler.asked) == 4


def test_all_policies_are_compared(compiler):
    stage = load_for_a_pod("voco", batch_size=32, accumulate=4)
    stage = dataclasses.replace(stage, mesh=MeshConfig(data=1, fsdp=-1))
    found = compare_remat(stage, Topology("v5e:2x2"))
    assert {report["mesh"]["fsdp"] for report in found.reports} == {4}, "as a search names it"
    assert [(report["remat"], report["fits"]) for report in found.reports] == [
        ("full", True), ("attention_out", True), ("offload", True), ("minimal", False), ("none", False)]


@pytest.mark.parametrize(("space", "message"), [
    ({"policies": ["fulll"]}, "policies must be some of full, .*got fulll"),
    ({"rows": ["1", "0"]}, "rows must be numbers"),
    ({"meshes": ["1x8x1"]}, "meshes must be data x fsdp x tensor = 4 devices of a slice of v5e:2x2, as 1x4x1"),
    ({"rows": ["3"]}, "batch_size must be a multiple"),
])
def test_what_cannot_be_searched_is_refused(compiler, space, message):
    with pytest.raises(ConfigError, match=message):
        search(load_for_a_pod("voco", batch_size=32), Topology("v5e:2x2"), **space)
    assert not compiler.asked
