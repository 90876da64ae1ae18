"""The report on both plans by frames: what it compiles, what a frame must take, and what its table says."""

import pytest

from tests.helpers.stages import load
from vocojax.config import ConfigError
from vocojax.costs.steps.attention import row_counts
from vocojax.costs.steps.videos import frames_report, frames_table, growth, kept_per_frame, with_frames
from vocojax.costs.topologies import Topology


def test_both_plans_hold_the_same_video_and_text():
    """8 units of 1 + 576 + 1 + 2 tokens and 512 of text: 5,152 tokens, in 41 blocks of 128."""
    stage = load("video_7b")
    single, double = (with_frames(stage, plan, 8) for plan in ("single_pass", "two_stage"))
    assert (single.data.row_length, double.data.row_length) == (5248, 512)
    assert single.data.images_per_row == double.data.images_per_row == 8
    found = row_counts(double)
    assert (found.tokens, found.targets, found.images) == (5152, 256, 8)
    assert found.pairs == 8 * 580 * 581 / 2 + 512 * 16 + 512 * 513 / 2
    assert row_counts(single).tokens == 5248


def test_a_frame_must_take_its_keys_and_values_and_its_pixels():
    """2 x 32 layers x 2 tokens x 32 heads x 128 x 2 bytes are 1 MiB; 336 x 336 x 3 bytes."""
    assert kept_per_frame(load("video_7b")) == 2**20 + 338_688


def report(plan, frames, peak, temporaries, error=""):
    kinds = {"parameters": 20 * 10**9} | ({"temporaries": temporaries} if peak else {})
    return {"plan": plan, "frames": frames, "peak_bytes": peak, "hbm_bytes_per_device": kinds, "fits": not error,
            "error": error, "estimated_seconds": 2.5 if peak else None, "collective_bytes": {"all-gather": 3 * 10**9}}


def test_the_table_says_what_a_frame_adds_and_what_does_not_fit():
    reports = [report("single_pass", 8, 30 * 10**9, 10 * 10**9), report("single_pass", 64, None, 0, "out of memory"),
               report("two_stage", 8, 30 * 10**9, 10 * 10**9), report("two_stage", 108, 30_150_000_000, 10**10)]
    assert growth(reports[2], reports[3]) == 1.5e6
    lines = frames_table(load("video_7b"), reports).splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["single_pass", "8", "20.00", "10.00", "2.50"],
        ["single_pass", "64", "20.00", "does", "not", "fit:", "out", "of", "memory"],
        ["two_stage", "8", "20.00", "10.00", "2.50"],
        ["two_stage", "108", "20.00", "10.00", "1.50", "2.50"],
    ]
    assert lines[5].endswith("1.39 MB") and lines[7].split() == ["8", "all-gather", "3.00"]


def test_a_stage_of_images_has_no_frames():
    with pytest.raises(ConfigError, match=r"data\.source must be a source of videos for --frames, got 'llava'"):
        frames_report(load("voco"), Topology("v5p:2x2x1"), [8])
