"""The static costs: their parsers on small texts, their counts by brute force, one kernel against theory."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vocojax.costs.kernels import bundles, gpu, layouts, report, tpu
from vocojax.devices import GPUS, V5_MACHINE, known_tpu
from vocojax.kernels.interval_attention.block_info import EMPTY, TileCode
from vocojax.kernels.interval_attention.tpu_blocks import GENERATIONS, fitted

MACHINE = V5_MACHINE

# A loop of five kinds of bundle: a guarded product, a guarded vector operation, and the way back.
DUMP = """
     0   :  { %s1 = smov 0 }
   0x1   :  { %v2 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %v3 = vadd.f32 %v1, %v2  /* Start region 1 */ }
   0x2   :  { (%p1) sbr.rel (!%p1) target = $region3 }
   0x3   :  { %s2 = snop 0 }
   0x4   :  { %s2 = snop 0 }
   0x5   :  { %s2 = snop 0 }
   0x6   :  { %s2 = snop 0 }
   0x7   :  { %v5 = vmatmul.bf16.gmra.mxu1 %v1  ;;  %6 = vst [vmem:[#allocation7_spill] sm:$0xff] %v9 }
   0x8   :  { %v7 = vpop.f32.mrf.mxu1 /* Start region 3 */ }
   0x9   :  { %p9 = scmp.lt.s32 %s1, 8  ;;  (%p9) sbr.rel (%p9) target = $region1 }
   0xa   :  { %s2 = snop 0 }
   0xb   :  { %s2 = snop 0 }
   0xc   :  { %s2 = snop 0 }
   0xd   :  { %s2 = snop 0 }
"""


def test_bundles_are_parsed_with_their_branches_and_spills():
    parsed = bundles.parse(DUMP)
    assert len(parsed) == 14
    assert parsed[1].ops == ("vmatmul.bf16.gmra.mxu0", "vadd.f32")
    assert parsed[2].branches == ((True, 8),) and parsed[9].branches == ((True, 1),)
    assert [b.spills for b in parsed] == [0] * 7 + [1] + [0] * 6


def test_a_step_goes_around_the_regions_that_it_skips():
    loop = bundles.GridLoop(bundles.parse(DUMP), MACHINE)
    assert (loop.head, loop.tail) == (1, 9)
    (region,) = loop.regions
    assert (region.branch, region.end, region.matmuls) == (2, 8, 1)
    assert len(loop.step(set())) == 13 and len(loop.step({region})) == 12
    assert bundles.matrix_cycles(loop.step(set()), MACHINE) == 2 * MACHINE.matmul_bf16 / MACHINE.mxus
    assert bundles.matrix_cycles(loop.step({region}), MACHINE) == MACHINE.matmul_bf16 / MACHINE.mxus
    assert loop.cycles(set()) == loop.cycles({region}) == max(13, MACHINE.matmul_bf16)


def test_a_loop_inside_a_grid_step_is_refused():
    inner = "   0x8   :  { %v7 = vpop.f32.mrf.mxu1  ;;  (%p9) sbr.rel (%p9) target = $region3 /* Start region 3 */ }"
    lines = [inner if line.strip().startswith("0x8 ") else line for line in DUMP.splitlines()]
    with pytest.raises(ValueError, match="a loop of its own"):
        bundles.GridLoop(bundles.parse("\n".join(lines)), MACHINE)


def test_a_replay_waits_for_results():
    path = [bundles.Bundle((op,), (), 0, 0) for op in ("vmatmul.bf16.gmra.mxu0", *["vpop.f32.mrf.mxu0"] * 2)]
    assert bundles.replay(path, MACHINE) == MACHINE.result + MACHINE.second_half + 1
    path = [bundles.Bundle((op,), (), 0, 0) for op in ("vpow2.f32", "vpop.eup")]
    assert bundles.replay(path, MACHINE) == MACHINE.eup_result + 1


def test_a_transposition_of_two_registers_takes_twice_as_long_and_has_two_results():
    turn, pop = (bundles.Bundle((op,), (), 0, 0) for op in ("vxpose.binary.xlu0.c.b16.cont", "vpop.trf.xlu0"))
    assert bundles.replay([turn] * 10, MACHINE) == 10 * 2 * MACHINE.xlu
    assert bundles.replay([turn, pop, pop], MACHINE) == MACHINE.xlu_result + 2


def test_a_replay_waits_for_a_busy_matrix_unit():
    product = bundles.Bundle(("vmatmul.bf16.gmra.mxu0",), (), 0, 0)
    elsewhere = bundles.Bundle(("vmatmul.bf16.gmra.mxu1",), (), 0, 0)
    assert bundles.replay([product] * 10, MACHINE) == 10 * MACHINE.matmul_bf16
    assert bundles.replay([product, elsewhere] * 5, MACHINE) == 5 * MACHINE.matmul_bf16


LISTING = """
.text.attend:
.L_x_0:
        /*0000*/                   LDG.E.128 R4, [R2] ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0020*/                   MUFU.EX2 R9, R8 ;
        /*0030*/                   LDSM.16.MT88.4 R4, [R10] ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


def test_gpu_loops_are_the_innermost_ones_with_products():
    code = gpu.disassembled(LISTING)["attend"]
    assert code[4] == (0x40, "BRA", 0x10)
    (loop,) = gpu.loops(code, 4, GPUS["a100"])
    assert loop.tensor_flops == 4 * 2 * 16 * 8 * 16
    assert loop.cycles["tensor"] == loop.tensor_flops / 2048
    assert loop.cycles["mufu"] == 4 * 32 / 16
    assert loop.cycles["shared"] == 4 * 4 * 128 / 128
    assert loop.cycles["issue"] == 4 and loop.bound == 16


def test_a_warpgroup_product_is_shared_by_its_four_warps():
    assert gpu.tensor_flops(["HGMMA.64x128x16.F32.BF16"]) == 2 * 64 * 128 * 16 / 4


@pytest.mark.parametrize("letter", "abcd")
def test_the_kernels_compute_the_tiles_with_a_visible_pair_and_no_other(letter):
    layout = layouts.layouts()[letter]
    tables = GENERATIONS.values()
    cuts = [(x.forward_of(layout.length), None) for x in tables]
    cuts += [(x.backward_of(layout.length), 2) for x in tables]
    sizes = {(fitted(blocks, layout.length, layout.length), spans) for blocks, spans in cuts}
    for q, k, spans in {(blocks.q, blocks.k, spans) for blocks, spans in sizes}:
        kinds = report.tile_codes(layout, q, k, spans) & TileCode.KIND
        assert (kinds != EMPTY).sum() == layout.tiles_with_a_visible_pair(q, k)


def test_layouts_are_what_their_titles_say():
    by_letter = layouts.layouts()
    assert {k: (x.rows, x.length) for k, x in by_letter.items()} == {
        **{"a": (8, 2048), "b": (1, 704), "c": (1, 16640), "d": (1, 8192)}
    }
    b = by_letter["b"]
    i, j = np.arange(704)[:, None], np.arange(704)
    seen = (b.start[0][i] <= j) & (j <= i) & (i < b.stop[0])
    assert seen[575].sum() == 576, "the VoCo token sees its whole unit"
    assert seen[576].sum() == 2 and seen[576, 575], "the first text token sees the VoCo token and itself"


def test_visible_pairs_at_the_full_rate_take_what_theory_says():
    """A causal row of 8,192 has 33,558,528 pairs; v5e does 197 TFLOP/s."""
    causal = layouts.layouts()["d"]
    forward, backward = (report.visible_seconds(causal, "TPU v5 lite", backward=backward) for backward in (False, True))
    assert forward == pytest.approx(33_558_528 * 32 * 4 * 128 / 197e12)
    assert backward == pytest.approx(2.5 * forward)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
)


@needs_libtpu
@pytest.mark.parametrize(("chip", "cores", "heads"), [("v5e:1x1", 1, (2, 2)), ("v4:1x1x1", 2, (1, 1))])
def test_a_compiled_kernel_does_the_products_that_theory_says(chip, cores, heads, tmp_path):
    """A chip is one device, also where two cores share the work: of two heads, a step has one then."""
    jobs = [tpu.Job("ours", 256, heads=2), tpu.Job("rotary", 256, heads=2)]
    passes, rotary = tpu.compile_jobs(chip, jobs, str(tmp_path))
    assert list(passes) == [f"interval_attention_{name}" for name in ("forward", "mean", "backward")]
    forward, mean, backward = passes.values()
    assert all(kernel.parallel and kernel.cores == cores for kernel in (forward, backward))
    flops_per_cycle = 4 * 128 * 128 * 2  # four matrix units of 128 x 128
    # Pairs and products of a tile, counts of a dirty one (the keys seen, the queries that see), regions around it.
    passes = ((forward, heads[0], 256 * 128, 2, 1, (1, 1)), (backward, heads[1], 256 * 256, 5, 2, (2, 2)))
    for kernel, at_once, pairs, products, counts, regions in passes:
        costs = tpu.tile_costs(kernel)
        want = at_once * products * 2 * pairs * 128 / flops_per_cycle
        assert costs.matrix[:2] == (want, want), "a full and a partial tile"
        assert costs.matrix[2] == want + counts * 2 * pairs * 128 / flops_per_cycle
        assert min(costs.tiles) > max(costs.idle, want)
        assert (len(costs.before), len(costs.after)) == regions
    for kernel, arrays in ((mean, 2), *((kernel, 2) for kernel in rotary.values())):
        assert kernel.steps > 0, "its grid is known"
        at_least = arrays * 256 * 2 * 128 * 2 / known_tpu(kernel.device_kind).bandwidth
        assert at_least < tpu.streaming_seconds(kernel) < 20 * at_least


@pytest.mark.slow
@needs_libtpu
def test_the_report_has_the_figures_that_it_promises(tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, "launch/kernel_report.py", "--topology", "v5e:1x1", "--json", str(out)]
    printed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    figures = json.loads(out.read_text())
    assert set(figures) == {"layouts", "gpu"} and set(figures["layouts"]) == set("abcd")
    for layout in figures["layouts"].values():
        assert layout["live_tiles"] == layout["tiles_with_a_visible_pair"]
        entry = layout["v5e:1x1"]
        assert entry["ratio"] == pytest.approx(entry["splash"]["seconds"] / entry["ours"]["seconds"])
        for figure in ("seconds", "mxu_util", "spills"):
            assert entry["ours"][figure] > 0 and entry["splash"][figure] > 0
        for direction in ("forward", "backward"):
            assert 0 < entry["ours"][direction]["visible_share"] < 1
    assert "splash" in printed
