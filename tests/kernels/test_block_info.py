"""The block map and the tile lists against brute force: exact for packings, and for arbitrary vectors too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import attention_oracle as oracle
from vocojax.kernels.interval_attention import IntervalMask
from vocojax.kernels.interval_attention.block_info import (
    DIRTY,
    EMPTY,
    FULL,
    PARTIAL,
    TileCode,
    block_kinds,
    padded_vectors,
    tile_list,
    with_dirty,
)

# (queries, keys, query block, key block)
CASES = [(48, 48, 8, 8), (48, 48, 12, 4), (48, 48, 4, 16), (21, 48, 8, 16), (5, 48, 8, 5), (47, 48, 10, 7)]


def kinds_by_brute_force(visible_BQK: np.ndarray, block_q: int, block_k: int) -> np.ndarray:
    B, Q, K = visible_BQK.shape
    padded = np.pad(visible_BQK, ((0, 0), (0, -Q % block_q), (0, -K % block_k)))
    tiles = padded.reshape(B, -1, block_q, padded.shape[2] // block_k, block_k)
    return np.where(tiles.all((2, 4)), FULL, np.where(tiles.any((2, 4)), PARTIAL, EMPTY))


@functools.partial(jax.jit, static_argnums=(1, 2))
def kinds_of(mask: IntervalMask, block_q: int, block_k: int) -> jnp.ndarray:
    return block_kinds(*padded_vectors(mask, block_q, block_k), mask.prefix, block_q, block_k)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kinds_are_exact_on_packings(case):
    Q, K, block_q, block_k = case

    @oracle.QUICK
    @given(st.lists(oracle.packed_rows(K), min_size=2, max_size=2))
    def check(rows):
        start, stop, visible = oracle.masks(rows, Q)
        kinds = kinds_of(IntervalMask(jnp.asarray(start), jnp.asarray(stop)), block_q, block_k)
        np.testing.assert_array_equal(kinds, kinds_by_brute_force(visible, block_q, block_k))

    check()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_kinds_are_exact_for_arbitrary_vectors(case, seed):
    Q, K, block_q, block_k = case
    rng = np.random.default_rng(seed)
    start = rng.integers(-1, K + 2, (64, Q)).astype(np.int32)
    stop = rng.integers(-1, K + 2, (64, K)).astype(np.int32)
    start[::2], stop[::2] = start[::2] // 4, K - stop[::2] // 4  # half of them dense enough to hold full tiles
    mask = IntervalMask(jnp.asarray(start), jnp.asarray(stop))
    want = kinds_by_brute_force(np.asarray(mask.dense()), block_q, block_k)
    assert {EMPTY, PARTIAL} <= set(want.flat)
    np.testing.assert_array_equal(kinds_of(mask, block_q, block_k), want)


@pytest.mark.parametrize("case", CASES[3:], ids=str)
def test_kinds_are_exact_for_all_of_int32(case):
    Q, K, block_q, block_k = case

    @oracle.QUICK
    @given(oracle.any_vectors(Q, K))
    def check(vectors):
        want = kinds_by_brute_force(oracle.visible_by_rule(*vectors), block_q, block_k)
        np.testing.assert_array_equal(kinds_of(IntervalMask(*map(jnp.asarray, vectors)), block_q, block_k), want)

    check()


@functools.partial(jax.jit, static_argnums=(1, 2))
def kinds_with_dirty(mask: IntervalMask, block_q: int, block_k: int) -> jnp.ndarray:
    start, stop = padded_vectors(mask, block_q, block_k)
    kinds = block_kinds(start, stop, mask.prefix, block_q, block_k)
    return with_dirty(kinds, start, stop, mask.prefix, block_q, block_k)


def assert_dirty(start: np.ndarray, stop: np.ndarray, visible_BQK: np.ndarray, block_q: int, block_k: int) -> None:
    """Only partial tiles are called dirty, and all of those with a query or key that takes part in nothing."""
    got = np.asarray(kinds_with_dirty(IntervalMask(jnp.asarray(start), jnp.asarray(stop)), block_q, block_k))
    want = kinds_by_brute_force(visible_BQK, block_q, block_k)
    np.testing.assert_array_equal(np.where(got == DIRTY, PARTIAL, got), want)
    blocks = lambda dead_BS, size: np.pad(dead_BS, ((0, 0), (0, -dead_BS.shape[1] % size))).reshape(
        len(dead_BS), -1, size).any(2)
    dead = blocks(~visible_BQK.any(2), block_q)[:, :, None] | blocks(~visible_BQK.any(1), block_k)[:, None]
    assert (got == DIRTY)[dead & (want == PARTIAL)].all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_partial_tiles_with_what_takes_part_in_nothing_are_dirty(case):
    Q, K, block_q, block_k = case

    @oracle.QUICK
    @given(st.lists(oracle.packed_rows(K), min_size=2, max_size=2))
    def check(rows):
        assert_dirty(*oracle.masks(rows, Q), block_q, block_k)

    check()
    rng = np.random.default_rng(0)
    start, stop = (rng.integers(-1, K + 2, (64, n)).astype(np.int32) for n in (Q, K))
    visible = np.asarray(IntervalMask(jnp.asarray(start), jnp.asarray(stop)).dense())
    assert_dirty(start, stop, visible, block_q, block_k)


def test_tiles_of_tokens_that_see_themselves_are_not_dirty():
    kinds = np.asarray(kinds_with_dirty(IntervalMask.causal(1, 64), 16, 8))
    assert set(kinds.flat) == {EMPTY, PARTIAL, FULL}
    padded = IntervalMask(jnp.arange(64)[None] // 48 * 64, jnp.full((1, 64), 48))
    kinds = np.asarray(kinds_with_dirty(padded, 16, 8))
    assert DIRTY not in kinds[:, :3, :6]


def test_a_prefix_that_no_query_reaches_is_dirty():
    """Keys 4 and 5 of eight before the first query are seen by nobody, 6 and 7 beside them are."""
    start, stop = np.full((1, 8), 6, np.int32), np.full((1, 16), 16, np.int32)
    kinds = kinds_with_dirty(IntervalMask(jnp.asarray(start), jnp.asarray(stop)), 4, 4)
    np.testing.assert_array_equal(kinds, [[[EMPTY, DIRTY, PARTIAL, EMPTY], [EMPTY, DIRTY, FULL, PARTIAL]]])


def walk(kinds: np.ndarray, prefix: int, block_q: int, block_k: int, spans: int | None):
    """The used part of a tile list, unpacked: [(row, query block, key block, kind, flags)]."""
    tiles = tile_list(jnp.asarray(kinds), prefix, block_q, block_k, spans)
    at, codes = tiles.layout, np.asarray(tiles.codes)[: int(tiles.count)]
    return [
        (int(at.row(c)), int(at.query_block(c)), int(at.key_block(c)), int(c & TileCode.KIND), int(c)) for c in codes
    ]


@pytest.mark.parametrize("spans", [None, 1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_lists_hold_every_live_tile_once_and_every_output_block(spans, seed):
    B, N, M, block_q, block_k, prefix = 3, 6, 5, 8, 16, 30
    rng = np.random.default_rng(seed)
    a, b = np.meshgrid(np.arange(N), np.arange(M), indexing="ij")
    kinds = rng.choice([EMPTY, EMPTY, PARTIAL, FULL], (B, N, M)) * (b * block_k < prefix + (a + 1) * block_q)
    kinds[0, 2], kinds[1, :, 3], kinds[2] = EMPTY, EMPTY, EMPTY  # a blind query block, an unseen key block, a blind row
    tiles = walk(kinds, prefix, block_q, block_k, spans)

    live = {(r, a, b): kind for r, a, b, kind, _ in tiles if kind != EMPTY}
    assert live == {at: kinds[at] for at in map(tuple, np.argwhere(kinds))}
    assert len({t[:3] for t in tiles}) == len(tiles)

    span_of = lambda a: 0 if spans is None else next(s for s in range(spans) if a < (s + 1) * N // spans)
    group = lambda t: (t[0], t[1]) if spans is None else (t[0], span_of(t[1]), t[2])
    outer = lambda t: (t[0], t[1]) if spans is None else (t[0], span_of(t[1]))
    outputs = {(r, a) for r in range(B) for a in range(N)}
    if spans is not None:
        outputs = {(r, s, b) for r in range(B) for s in range(spans) for b in range(M)}
    assert {group(t) for t in tiles} == outputs
    assert sum(t[3] == EMPTY for t in tiles) == len(outputs - {group((*at, 0)) for at in live})

    for key, opens, closes in ((group, TileCode.FIRST, TileCode.LAST), (outer, TileCode.OPEN, TileCode.CLOSE)):
        names = [key(t) for t in tiles]
        runs = [n for i, n in enumerate(names) if i == 0 or names[i - 1] != n]
        assert len(runs) == len(set(runs)), "a group is visited in one go"
        for i, t in enumerate(tiles):
            assert bool(t[4] & opens) == (i == 0 or names[i - 1] != names[i])
            assert bool(t[4] & closes) == (i == len(tiles) - 1 or names[i + 1] != names[i])


def test_the_dense_mask_can_be_rebuilt_from_kinds_and_vectors():
    @oracle.QUICK
    @given(st.lists(oracle.packed_rows(48), min_size=2, max_size=2))
    def check(rows):
        start, stop, visible = oracle.masks(rows, 48)
        kinds = np.asarray(kinds_of(IntervalMask(jnp.asarray(start), jnp.asarray(stop)), 8, 12))
        rebuilt = np.zeros((2, 48, 48), bool)
        for r, a, b, kind, _ in walk(kinds, 0, 8, 12, None):
            i, j = np.arange(8 * a, 8 * a + 8)[:, None], np.arange(12 * b, 12 * b + 12)
            partial = (start[r, i] <= j) & (j <= i) & (i < stop[r, j])
            rebuilt[r, i, j] = {EMPTY: False, PARTIAL: partial, FULL: True}[kind]
        np.testing.assert_array_equal(rebuilt, visible)

    check()


def test_rows_that_do_not_fit_the_list_say_so():
    with pytest.raises(ValueError, match="do not fit the kernel's list"):
        jax.eval_shape(
            lambda kinds: tile_list(kinds, 0, 8, 8).codes, jax.ShapeDtypeStruct((1 << 20, 64, 64), jnp.int32)
        )
