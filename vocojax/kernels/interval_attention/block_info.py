"""Tiles of the attention square that hold visible pairs: found from the two mask vectors, on the device, never S x S.

A kernel cuts the `[Q, K]` square into tiles of `block_q x block_k` pairs. `block_kinds` says of each tile whether it is
empty, partial or full. Kernels walk a `TileList`, which holds only tiles with a visible pair: an empty tile costs
nothing at all. Both are exact for every pair of vectors, not only for the layouts of this project.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vocojax.errors import InputError
from vocojax.kernels.interval_attention.mask import NEVER, IntervalMask, clipped, range_max

EMPTY, PARTIAL, FULL, DIRTY = 0, 1, 2, 3


def padded_vectors(mask: IntervalMask, multiple_q: int, multiple_k: int) -> tuple[jax.Array, jax.Array]:
    """Pads `start` and `stop` to multiples of the blocks: added queries see nothing, nobody sees added keys.

    The mask's own entries are clipped to [0, K], so that kernels may add to and subtract from them.
    """
    (_, Q), (_, K) = mask.start.shape, mask.stop.shape
    start, stop = clipped(mask.start, mask.stop)
    start = jnp.pad(start, ((0, 0), (0, -Q % multiple_q)), constant_values=NEVER)
    return start, jnp.pad(stop, ((0, 0), (0, -K % multiple_k)))


def block_kinds(start_BQ: jax.Array, stop_BK: jax.Array, prefix: int, block_q: int, block_k: int) -> jax.Array:
    """Returns the kind of every tile, int32 `[B, Q / block_q, K / block_k]`.

    EMPTY tiles have no visible pair, in FULL ones every pair is visible, all others are PARTIAL. The vectors are those
    of `padded_vectors` for an `IntervalMask` whose first query has index `prefix`. This takes
    O(K log Q + K * Q / block_q) work, and nothing larger than a flag per key and query block.

    A key `j` is visible to the rows of its span `[max(j, P), stop[j])` whose `start` is at most `j`. Where the span
    covers a whole query block, that block's smallest `start` decides. The span's first and last block are covered in
    part, and the smallest `start` over the covered part decides.
    """
    (B, Q), K = start_BQ.shape, stop_BK.shape[1]
    start_BQ, stop_BK = clipped(start_BQ, stop_BK)
    j_K = jnp.arange(K, dtype=jnp.int32)
    first_row_BK = jnp.broadcast_to(jnp.maximum(j_K - prefix, 0), (B, K))  # the key's span, in query rows
    end_row_BK = jnp.minimum(stop_BK - prefix, Q)

    def visible_within(low_BK: jax.Array, high_BK: jax.Array) -> jax.Array:
        return -range_max(-start_BQ, low_BK, high_BK) <= j_K

    block_end = lambda row: (row // block_q + 1) * block_q
    head_BK = visible_within(first_row_BK, jnp.minimum(end_row_BK, block_end(first_row_BK)))
    tail_low = jnp.maximum(first_row_BK, (end_row_BK - 1) // block_q * block_q)
    tail_BK = visible_within(tail_low, end_row_BK)

    a_N1 = jnp.arange(Q // block_q, dtype=jnp.int32)[:, None]
    start_BNq = start_BQ.reshape(B, -1, block_q)
    covered = (first_row_BK[:, None] <= a_N1 * block_q) & ((a_N1 + 1) * block_q <= end_row_BK[:, None])
    live_BNK = (
        (covered & (start_BNq.min(-1)[..., None] <= j_K))
        | (head_BK[:, None] & (first_row_BK[:, None] // block_q == a_N1))
        | (tail_BK[:, None] & ((end_row_BK[:, None] - 1) // block_q == a_N1))
    )
    live = live_BNK.reshape(B, Q // block_q, K // block_k, block_k).any(-1)

    first_query = prefix + a_N1 * block_q
    first_key = jnp.arange(K // block_k, dtype=jnp.int32) * block_k
    full = (
        (start_BNq.max(-1)[..., None] <= first_key)
        & (first_key + block_k - 1 <= first_query)
        & (first_query + block_q - 1 < stop_BK.reshape(B, 1, -1, block_k).min(-1))
    )
    return jnp.where(full, FULL, jnp.where(live, PARTIAL, EMPTY)).astype(jnp.int32)


def with_dirty(
    kinds_BNM: jax.Array, start_BQ: jax.Array, stop_BK: jax.Array, prefix: int, block_q: int, block_k: int
) -> jax.Array:
    """Returns the kinds with DIRTY in place of PARTIAL for tiles that a kernel has to clean.

    Such a tile may hold a query that sees nothing or a key that nobody sees. Their values may be anything, also NaN. A
    tile stays PARTIAL if each of its queries sees its own key and each of its keys is seen by its own query.
    """
    (B, Q), K = start_BQ.shape, stop_BK.shape[1]
    # For every query the `stop` of its own key, and for every key the `start` of the first query that may see it.
    own_stop_BQ = jnp.pad(stop_BK, ((0, 0), (0, max(0, prefix + Q - K))))[:, prefix : prefix + Q]
    first_start_BK = jnp.pad(start_BQ, ((0, 0), (prefix, 0)), mode="edge")
    first_start_BK = jnp.pad(first_start_BK, ((0, 0), (0, max(0, K - prefix - Q))), constant_values=NEVER)[:, :K]
    i_Q, j_K = prefix + jnp.arange(Q), jnp.arange(K)
    sees_BQ = (start_BQ <= i_Q) & (i_Q < own_stop_BQ)
    seen_BK = (first_start_BK <= j_K) & (jnp.maximum(j_K, prefix) < stop_BK)
    clean_q = sees_BQ.reshape(B, -1, block_q).all(-1)
    clean_k = seen_BK.reshape(B, -1, block_k).all(-1)
    dirty = (kinds_BNM == PARTIAL) & ~(clean_q[:, :, None] & clean_k[:, None])
    return jnp.where(dirty, DIRTY, kinds_BNM)


@dataclasses.dataclass(frozen=True)
class TileCode:
    """How a tile is packed in one int32 for scalar memory.

    From high to low bits: row, query block, key block, flags and kind. `FIRST` and `LAST` open and close a group of
    tiles that accumulate into the same output block. `OPEN` and `CLOSE` do the same for the outer group of the backward
    pass: all tiles of one row, or of one span of its queries.

    Attributes:
      bits_q: for the number of the query block.
      bits_k: for the number of the key block.
    """

    bits_q: int
    bits_k: int

    KIND, FIRST, LAST, OPEN, CLOSE = 3, 1 << 2, 1 << 3, 1 << 4, 1 << 5
    LOW = 6

    def pack(self, row: np.ndarray, query_block: np.ndarray, key_block: np.ndarray) -> np.ndarray:
        return (((row << self.bits_q | query_block) << self.bits_k) | key_block) << self.LOW

    def row(self, code: jax.Array) -> jax.Array:
        return code >> (self.LOW + self.bits_k + self.bits_q)

    def query_block(self, code: jax.Array) -> jax.Array:
        return code >> (self.LOW + self.bits_k) & ((1 << self.bits_q) - 1)

    def key_block(self, code: jax.Array) -> jax.Array:
        return code >> self.LOW & ((1 << self.bits_k) - 1)


@dataclasses.dataclass(frozen=True)
class TileList:
    """The tiles that a kernel walks, in order.

    Attributes:
      codes: int32 `[T]`.
      count: int32 scalar, how many of the codes are used, from the first on.
      layout: how a code is packed.
    """

    codes: jax.Array
    count: jax.Array
    layout: TileCode


def tile_list(kinds_BNM: jax.Array, prefix: int, block_q: int, block_k: int, spans: int | None = None) -> TileList:
    """Lists the tiles with a visible pair of every row, grouped by the output block that they accumulate into.

    With `spans=None` a group is a row's query block (the forward pass). Otherwise a group is a key block within one of
    `spans` equal spans of a row's query blocks (the backward pass). A group without a visible pair has one EMPTY tile
    on the list, because its output block has to be written all the same.

    Raises:
      ValueError: a tile's place does not fit into an int32.
    """
    B, N, M = kinds_BNM.shape
    layout = TileCode(max(N - 1, 1).bit_length(), max(M - 1, 1).bit_length())
    if B.bit_length() + layout.bits_q + layout.bits_k + layout.LOW > 31:
        raise InputError(f"{B} rows of {N} x {M} tiles do not fit the kernel's list: use fewer rows or larger blocks")

    # The candidates of one row are known when the program is built: no tile in the future of its queries is live.
    a_C, b_C, group_C, outer_C = _candidates(N, M, prefix, block_q, block_k, spans)
    kinds_BC = kinds_BNM[:, a_C, b_C]
    groups = group_C.max() + 1
    group_live_BC = jnp.zeros((B, groups), bool).at[:, group_C].max(kinds_BC != EMPTY)[:, group_C]
    opens_group = np.append(True, group_C[1:] != group_C[:-1])
    listed = ((kinds_BC != EMPTY) | (~group_live_BC & opens_group)).reshape(-1)

    rows_B1 = np.arange(B)[:, None]
    codes = (layout.pack(rows_B1, a_C, b_C) | kinds_BC).reshape(-1)
    order = jnp.argsort(~listed, stable=True)
    count = listed.sum(dtype=jnp.int32)

    def ends(group_BC: np.ndarray) -> tuple[jax.Array, jax.Array]:
        group = jnp.asarray(group_BC.reshape(-1))[order]
        changes = group[1:] != group[:-1]
        is_last = jnp.append(changes, True) | (jnp.arange(group.size) == count - 1)
        return jnp.append(True, changes), is_last

    first, last = ends(rows_B1 * groups + group_C)
    opening, closing = ends(rows_B1 * (outer_C.max() + 1) + outer_C)
    flags = first * TileCode.FIRST | last * TileCode.LAST | opening * TileCode.OPEN | closing * TileCode.CLOSE
    return TileList(codes[order] | flags, count, layout)


def _candidates(N: int, M: int, prefix: int, block_q: int, block_k: int, spans: int | None) -> tuple[np.ndarray, ...]:
    """Returns the query block, key block, group and outer group of every tile of a row that may hold a visible pair."""
    causal = lambda a, b: b * block_k < prefix + (a + 1) * block_q
    if spans is None:
        tiles = [(a, b, a, a) for a in range(N) for b in range(M) if b == 0 or causal(a, b)]
    else:
        tiles = []
        for span in range(spans):
            blocks = range(span * N // spans, (span + 1) * N // spans)
            for b in range(M):
                seen = [a for a in blocks if causal(a, b)] or [blocks[-1]]
                tiles += [(a, b, span * M + b, span) for a in seen]
    return tuple(np.array(x, np.int32) for x in zip(*tiles, strict=True))
