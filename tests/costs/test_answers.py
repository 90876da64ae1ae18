"""The report on Table 7: FLOPs that a formula gives too, literal summaries, and the launch script's JSON."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vocojax.config import PRESETS
from vocojax.costs.answers import Case, cache_bytes, count_flops, efficiency, measurable, summarise

ROOT = Path(__file__).parent.parent.parent


def by_hand(config, queries, keys, logits=1):
    """Two FLOPs for every weight and token, and for both products of dense attention."""
    d = config.decoder
    heads = (2 * d.num_heads + 2 * d.num_kv_heads) * d.head_width
    layer = 2 * queries * d.width * (heads + 3 * d.mlp_width) + 4 * queries * keys * d.num_heads * d.head_width
    return d.depth * layer + 2 * logits * d.width * d.vocab_size


def test_flops_are_those_of_the_formula(tiny_config):
    assert count_flops(tiny_config, Case("text only", 0, 24)) == by_hand(tiny_config, 24, 24)
    assert count_flops(tiny_config, Case("VoCo cache", 2, 24)) == by_hand(tiny_config, 24, 26)
    assert count_flops(tiny_config, Case("full cache", 0, 24)) == by_hand(tiny_config, 24, 24 + 6)


def test_the_cache_of_the_seven_billion_is_half_a_mebibyte_per_token():
    config = PRESETS["clip_l_336_vicuna_7b"]
    one, full = (cache_bytes(config, vocos) for vocos in (1, 0))
    assert (one, cache_bytes(config, 8), full) == (2**19, 8 * 2**19, 578 * 2**19)
    assert 1 - one / full >= 0.998


@pytest.mark.slow
@pytest.mark.parametrize("text", [32, 64, 128])
def test_the_seven_billion_meets_the_papers_savings(text):
    """The 7B shape, counted without making a parameter: the paper's savings at 32 tokens, and the floor everywhere."""
    config = PRESETS["clip_l_336_vicuna_7b"]
    floor = count_flops(config, Case("text only", 0, text))
    assert floor == pytest.approx(by_hand(config, text, text), rel=1e-6)
    for vocos in (1, 8, 128):
        assert count_flops(config, Case("VoCo cache", vocos, text)) <= 1.02 * floor
    if text == 32:
        assert count_flops(config, Case("VoCo cache", 1, 32)) < 0.06 * count_flops(config, Case("no cache", 0, 32))


def test_the_report_has_every_row_once(tiny_config):
    report = efficiency(tiny_config, [2], [8])
    assert [(row["method"], row["vocos"]) for row in report["rows"]] == [
        ("no cache", 0), ("full cache", 0), ("VoCo cache", 2), ("text only", 0)]
    d = tiny_config.decoder
    token = 2 * 2 * d.depth * d.num_kv_heads * d.head_width  # keys and values in bfloat16
    assert [row["cache_bytes"] for row in report["rows"]] == [0, 6 * token, 2 * token, 0]
    for row in report["rows"]:
        assert 0 < row["measured_first_token_seconds"] < row["measured_answer_seconds"]
    no_cache, full, voco = report["rows"][:3]
    assert no_cache["flops"] > full["flops"] > voco["flops"]
    assert voco["flops_to_compress"] > full["flops_to_compress"] > 0
    assert report["summary"]["cache_saved"] == 1 - 2 / 6 and report["measured"]["model"] == "the same"
    assert report["flops_counted_in"] == "the programs compiled for the CPU, with dense attention"
    json.dumps(report)


def test_a_summary_is_of_one_number_of_tokens():
    row = lambda method, vocos, text, size, flops, seconds: {
        "method": method, "vocos": vocos, "text": text, "cache_bytes": size, "flops": flops,
        "measured_first_token_seconds": seconds}
    rows = [row("no cache", 0, 32, 0, 1000, 4.0), row("full cache", 0, 32, 400, 110, 2.0),
            row("VoCo cache", 1, 32, 1, 51, 1.0), row("VoCo cache", 8, 32, 8, 60, 1.0),
            row("text only", 0, 32, 0, 50, 1.0), row("no cache", 0, 64, 0, 7, 7.0)]
    assert summarise(rows, 1, 32) == {
        "vocos": 1, "text": 32, "cache_saved": 0.9975, "flops_saved": 0.949, "flops_over_text_only": 1.02,
        "measured_first_token_ratio": 0.25}


def test_what_a_cpu_measures_keeps_the_vision_tokens():
    seven = PRESETS["clip_l_336_vicuna_7b"]
    small = measurable(seven)
    assert (small.decoder.width, small.decoder.depth, small.unit_tokens) == (512, 8, 576)
    assert measurable(small) == small
    assert dataclasses.replace(seven, decoder=small.decoder, vision=small.vision) == small


def test_launch_refuses_nonsense():
    run = lambda *flags: subprocess.run([sys.executable, "launch/efficiency.py", *flags], cwd=ROOT, text=True,
                                        capture_output=True, env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
    result = run("--config=configs/voco.py", "--vocos=1,x")
    assert result.returncode != 0 and "--vocos must be whole numbers >= 1 such as 1,8,128, got 1,x" in result.stderr
