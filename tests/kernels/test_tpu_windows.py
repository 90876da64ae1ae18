"""Heads of a grid step and the index maps: a step's windows hold the tile and the heads that it works on."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocojax.kernels.interval_attention.block_info import TileCode
from vocojax.kernels.interval_attention.tpu_blocks import GENERATIONS, Blocks, shared_by_cores
from vocojax.kernels.interval_attention.tpu_windows import (
    backward_heads,
    backward_windows,
    forward_heads,
    forward_windows,
    heads_per_step,
)

CODE = TileCode(4, 4)
TILE = (2, 5, 3)  # row, query block, key block
CODES = [CODE.pack(*map(np.int32, TILE))]
grouped_heads = st.builds(lambda kv, repeats: (kv * repeats, kv), st.integers(1, 8), st.integers(1, 8))
columns = st.integers(1, 16).map(lambda heads: heads * 128)


@settings(deadline=None)  # JAX starts in the first example
@given(grouped_heads, st.integers(1, 64))
def test_a_step_has_whole_groups_of_heads_or_a_part_of_one(heads, most):
    H, G = heads
    repeats = H // G
    found = heads_per_step(H, most, repeats)
    fits = [n for n in range(1, most + 1) if H % n == 0 and (n % repeats == 0 or repeats % n == 0)]
    assert found == max(fits)


@pytest.mark.parametrize(("generation", "heads", "groups"), [
    ("v5p", 32, 2), ("v5p", 16, 2), ("v5p", 2, 2), ("v5p", 1, 1), ("v5e", 32, 1), ("v5e", 1, 1), ("v4", 4, 2)])
def test_every_core_has_heads(generation, heads, groups):
    table = GENERATIONS[generation]
    blocks = shared_by_cores(table.forward, generation, heads * 128)
    assert heads // forward_heads(heads, heads, 128, blocks).query == groups
    blocks = shared_by_cores(table.backward, generation, heads * 128)
    step, _ = backward_heads(2048, heads, heads, 128, blocks, 2, table.dq_bytes)
    assert heads // step.group >= groups


@settings(deadline=None)
@given(grouped_heads, columns)
def test_a_forward_step_sees_the_keys_of_its_query_heads(heads, columns):
    H, G = heads
    blocks = Blocks(512, 512, columns)
    step = forward_heads(H, G, 128, blocks)
    windows = forward_windows(CODE, blocks, step, H // G)
    row, query_block, key_block = TILE
    for h in range(H // step.query):
        assert windows.q.index_map(h, 0, CODES) == (row, query_block, h)
        assert windows.lse.index_map(h, 0, CODES) == (row, h, 0, query_block)
        *place, kv_block = windows.k.index_map(h, 0, CODES)
        assert place == [row, key_block]
        for i in range(step.query):  # the kernel reads the part i * kv // query of the window
            assert kv_block * step.kv + i * step.kv // step.query == (h * step.query + i) // (H // G)
    assert windows.start.index_map(0, 0, CODES) == (row, 0, query_block)
    assert windows.stop.index_map(0, 0, CODES) == (row, key_block, 0)


@settings(deadline=None)
@given(grouped_heads, columns, st.integers(1, 8192), st.integers(1, 1 << 24))
def test_a_backward_step_sees_the_keys_of_its_query_heads(heads, columns, Q, dq_bytes):
    H, G = heads
    blocks = Blocks(512, 512, columns)
    step, spans = backward_heads(Q, H, G, 128, blocks, 2, dq_bytes)
    blocks_per_span = math.ceil(math.ceil(Q / 512) / spans)
    kept = blocks_per_span * 512 * step.group * 128 * (4 + 2 * 2)  # a float32 sum and two bfloat16 buffers
    assert kept <= dq_bytes or blocks_per_span == 1
    span = 3 * 512
    windows = backward_windows(CODE, blocks, step, span)
    row, query_block, key_block = TILE
    for h in range(H // step.group):
        assert windows.k.index_map(h, 0, 0, CODES) == (row, key_block, h)
        assert windows.dq.index_map(h, 0, 0, CODES) == (row, query_block // 3, h)
        assert windows.dk.index_map(h, 0, 0, CODES) == (query_block // 3, row, key_block, h)
        for turn in range(step.turns):
            *place, q_block = windows.q.index_map(h, 0, turn, CODES)
            assert place == [row, query_block]
            assert windows.row.index_map(h, 0, turn, CODES) == (row, q_block, 0, query_block)
            for i in range(step.query):
                assert h * step.kv + i * step.kv // step.query == (q_block * step.query + i) // (H // G)
    assert windows.start.index_map(0, 0, 0, CODES) == (row, 0, query_block)
    assert windows.stop.index_map(0, 0, 0, CODES) == (row, key_block, 0)
