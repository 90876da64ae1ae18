"""A rehearsal of a run: what its page and figures say of data, input, checkpoints, hours and cost."""

import dataclasses
import importlib.util
import json

import pytest

from vocojax.costs import rehearsal
from vocojax.costs.prices import costs_line, run_costs
from vocojax.costs.rehearsal import checkpoint_bytes, measured_gb_per_second, page, rehearse
from vocojax.costs.topologies import Topology
from vocojax.parallel.mesh import MeshConfig
from vocojax.training.config import CheckpointConfig

REPORT = {
    "devices": 64, "device_kind": "TPU v5", "estimated_seconds": 1.8, "estimated_from": "estimated_cycles",
    "mfu_bound": 0.5, "tokens_per_second_per_device": 2048.0, "peak_bytes": 40_000_000_000, "fits": True,
    "hbm_limit": 100_000_000_000, "error": "",
}


def test_hours_and_dollars_of_a_run():
    costs = run_costs(REPORT, 1000, price=4.2)
    assert costs == {"steps": 1000, "hours": pytest.approx(0.5), "dollars_per_chip_hour": 4.2,
                     "dollars_per_hour": pytest.approx(268.8), "dollars": pytest.approx(134.4)}
    assert costs_line(costs) == "0.5 hours for 1,000 steps; $268.80 per hour at $4.2 per chip and hour: $134.40 in all"
    assert costs_line(run_costs(REPORT, 1000)) == (
        "0.5 hours for 1,000 steps; --price=DOLLARS (per chip and hour) adds the cost")
    assert run_costs(REPORT | {"estimated_seconds": None}, 1000, 4.2) == {}


@pytest.mark.parametrize(("name", "hosts"), [
    ("v5p:4x4x4", 16), ("v4:2x2x1", 1), ("v5e:1x1", 1), ("v5e:2x4", 1), ("v5e:4x4", 4), ("v6e:16x16*2", 128),
    ("v5p:2x2x1*2", 2), ("h100:8", 1), ("h100:16", 2), ("h100:1", 1),
])
def test_hosts_of_a_topology(name, hosts):
    assert Topology(name).hosts == hosts


def test_a_page_about_the_stage_s_own_data(stage, monkeypatch):
    """4 rows a step, 4 steps. The slow step and the small need are made up; the data is packed and read."""
    monkeypatch.setattr(rehearsal, "compile_report", lambda *_, **__: REPORT)
    stage = dataclasses.replace(stage, checkpoint=CheckpointConfig(every=2))
    figures = rehearse(stage, Topology("v5e:2x2"), has_data=True, price=2.0, gb_per_second=0.001, seconds=0.2)
    row = figures["data"]
    assert row["records"] == 12 and 0.5 < row["fill"] <= 1 and 1 <= row["samples"] <= 3 and row["bad"] == 0
    assert figures["epochs"] == pytest.approx(4 * 4 * row["samples"] / 12)
    rate = figures["images_per_second_per_host"]
    assert rate["needed"] == pytest.approx(4 * row["images"] / 1.8) and rate["made_here"] > rate["needed"]
    assert figures["checkpoint"]["seconds"] == pytest.approx(figures["checkpoint"]["bytes"] / 1e6)
    assert figures["checkpoint"]["seconds_between"] == pytest.approx(3.6)
    text = page(figures)
    assert "12 of the stage's 12 records, laid out and packed" in text and ": enough" in text
    assert "1.8 s by estimated_cycles" in text and "$128.00 per hour" in text and "fits" in text
    json.dumps(figures)
    slow = page(figures | {"images_per_second_per_host": {"needed": 300.0, "made_here": 100.0, "cores_here": 2}})
    assert "TOO FEW, about 6 such cores per host are enough" in slow


def test_a_page_without_data(stage, monkeypatch):
    monkeypatch.setattr(rehearsal, "compile_report", lambda *_, **__: REPORT | {
        "estimated_seconds": None, "peak_bytes": None, "fits": False, "error": "RESOURCE_EXHAUSTED"})
    text = page(rehearse(stage, Topology("v5e:2x2"), has_data=False))
    for part in ("typical rows: the config names no data and tokenizer", "not compiled: RESOURCE_EXHAUSTED",
                 "name data and tokenizer to measure", "--gb_per_second=N, or --workdir", "memory      unknown"):
        assert part in text


def test_a_checkpoint_holds_masters_moments_and_averages(stage):
    bytes_, frozen = checkpoint_bytes(stage)
    optimizer = dataclasses.replace(stage.optimizer, ema=0.9)
    with_averages, _ = checkpoint_bytes(dataclasses.replace(stage, optimizer=optimizer))
    trained = with_averages - bytes_  # 4 bytes per number
    assert bytes_ == pytest.approx(3 * trained, rel=1e-3) and frozen > 0


def test_the_rate_of_a_directory_is_measured_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "WRITTEN", 2**20)
    assert measured_gb_per_second(tmp_path / "run") > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    measured_gb_per_second(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu (extra `tpu`)")
@pytest.mark.slow
def test_a_tiny_stage_is_rehearsed_on_a_topology(stage, tmp_path):
    """The compiler's report is real. The stage is rehearsed with its own data, and without."""
    stage = dataclasses.replace(stage, mesh=MeshConfig(data=1, fsdp=-1), attention="chunked")
    for has_data in (True, False):
        figures = rehearse(stage, Topology("v5e:2x2"), has_data=has_data, price=1.0, fast=True, seconds=0.5)
        assert figures["report"]["fits"] and figures["run"]["dollars_per_hour"] == 4.0
        assert figures["images_per_second_per_host"]["needed"] > 0
        assert "hours for 4 steps; $4.00 per hour" in page(figures)
