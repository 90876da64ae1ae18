"""The attention mask of VoCo-LLaMA as two integer vectors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

NEVER = jnp.iinfo(jnp.int32).max  # a `start` that no key reaches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntervalMask:
    """Who may attend to whom: query `i` may attend to key `j` iff `start[i] <= j <= i and i < stop[j]`.

    `start` is where the window of a query opens. `stop` is the first query that no longer sees a key.
    Query row `r` has index `i = P + r` where `P = K - Q` is the length of a key/value prefix (0 without a cache).

    One sample, a unit `[BOS] V V [\\n] [voco]` and three text tokens, then two tokens of padding (`#` = may attend):

            key      0 1 2 3 4 5 6 7 8 9
            query    B V V n c t t t . .     start
            0 BOS    #                           0
            1 V      # #                         0
            2 V      # # #                       0
            3 \\n     # # # #                     0
            4 voco   # # # # #                   0
            5 text           # #                 0
            6 text           # # #               0
            7 text           # # # #             0
            8 pad                                8
            9 pad                                9
            stop     5 5 5 5 8 8 8 8 8 9

    The text starts at 0 like the unit, but sees only its VoCo token: the other keys of the unit stop at the unit's end.
    Packing, prefixes, several units and several threads of text over one unit are the same two vectors.
    The rule is the attention mask of arXiv 2406.12275 section 3.1 (text attends to VoCo tokens, not to vision tokens).

    Attributes:
      start: int32 `[B, Q]`, per query: the first key of its window.
      stop: int32 `[B, K]`, per key: the first query index that no longer attends to it.
    """

    start: jax.Array
    stop: jax.Array

    @classmethod
    def causal(cls, batch: int, length: int) -> IntervalMask:
        """Returns the plain causal mask: one sample per row, `batch` rows of `length` tokens, no prefix."""
        return cls(jnp.zeros((batch, length), jnp.int32), jnp.full((batch, length), length, jnp.int32))

    @property
    def prefix(self) -> int:
        """`P`, the number of keys that come before the first query."""
        return self.stop.shape[-1] - self.start.shape[-1]

    def dense(self) -> jax.Array:
        """Returns the mask as bool `[B, Q, K]`, for the reference implementation, tests and drawings only."""
        i = self.prefix + jnp.arange(self.start.shape[-1])[:, None]
        j = jnp.arange(self.stop.shape[-1])
        return (self.start[:, :, None] <= j) & (j <= i) & (i < self.stop[:, None, :])

    def live_queries(self) -> jax.Array:
        """Returns which queries may attend to any key, bool `[B, Q]`. O(S log S), exact for every pair of vectors."""
        i = self.prefix + jnp.arange(self.start.shape[-1])
        last_stop = range_max(self.stop, self.start, jnp.broadcast_to(i + 1, self.start.shape))
        return last_stop > i

    def live_keys(self) -> jax.Array:
        """Returns which keys any query may attend to, bool `[B, K]`. O(S log S), exact for every pair of vectors."""
        j = jnp.arange(self.stop.shape[-1])
        first_row = jnp.broadcast_to(jnp.maximum(j - self.prefix, 0), self.stop.shape)
        start, stop = clipped(self.start, self.stop)
        first_start = -range_max(-start, first_row, stop - self.prefix)
        return first_start <= j


def clipped(start_BQ: jax.Array, stop_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns vectors with the same visible pairs, clipped to [0, K]: arithmetic on extreme values would wrap."""
    K = stop_BK.shape[1]
    return jnp.clip(start_BQ, 0, K), jnp.clip(stop_BK, 0, K)


def range_max(x_BS: jax.Array, low_BT: jax.Array, high_BT: jax.Array) -> jax.Array:
    """Returns the maximum of `x[b, low:high]` for each of the T ranges, and the smallest int32 + 1 for an empty range.

    Any range is covered by two (overlapping) windows whose length is a power of two, so a table of the maxima of all
    such windows answers every range with two reads.
    """
    B, S = x_BS.shape
    nothing = jnp.iinfo(jnp.int32).min + 1
    windows = [x_BS]
    while (width := 1 << (len(windows) - 1)) < S:
        later = jnp.pad(windows[-1][:, width:], ((0, 0), (0, min(width, S))), constant_values=nothing)
        windows.append(jnp.maximum(windows[-1], later))
    table = jnp.stack(windows, axis=1).reshape(B, -1)

    low, high = jnp.clip(low_BT, 0, S), jnp.clip(high_BT, 0, S)
    level = 31 - jax.lax.clz(jnp.maximum(high - low, 1))
    read = lambda at: jnp.take_along_axis(table, level * S + jnp.clip(at, 0, S - 1), axis=1)
    return jnp.where(high > low, jnp.maximum(read(low), read(high - (1 << level))), nothing)
