"""A step of decoding against the reference: the same rule, with the query's index given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vocojax.kernels.interval_attention import IntervalMask, interval_attention, one_query_attention


@pytest.mark.parametrize(("heads", "kv_heads", "dtype", "tolerance"),
                         [(4, 4, jnp.float32, 2e-6), (6, 2, jnp.float32, 2e-6), (4, 1, jnp.bfloat16, 2e-2)])
def test_it_is_the_reference_on_the_keys_written_so_far(heads, kv_heads, dtype, tolerance):
    """At index i of a cache of 12 slots the result is the reference's last query over the first i + 1 keys, whatever
    the slots behind hold."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    q, k, v = draw(3, heads, 8), draw(3, 12, kv_heads, 8), draw(3, 12, kv_heads, 8)
    start = jnp.array([0, 3, 5], jnp.int32)
    stop = jnp.asarray(random.integers(0, 16, (3, 12)), jnp.int32)
    run = jax.jit(one_query_attention)
    for index in (0, 4, 7, 11):
        end = index + 1
        expected = interval_attention(q[:, None], k[:, :end], v[:, :end], IntervalMask(start[:, None], stop[:, :end]),
                                      implementation="reference")[:, 0]
        behind = jnp.where(jnp.arange(12)[:, None] > index, 1e4, k.swapaxes(1, 2))
        got = run(q, behind.astype(dtype), v.swapaxes(1, 2), start, stop, jnp.int32(index))
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance)


def test_extreme_windows():
    """Literal: the smallest `start` opens the window at key 0, the largest sees nothing; so do the ends of `stop`."""
    low, high = -(2**31), 2**31 - 1
    v = jnp.broadcast_to(jnp.array([[1.0], [2], [6]]), (2, 1, 3, 1))
    stop = jnp.array([[high, low, high], [high, high, high]], jnp.int32)
    out = one_query_attention(jnp.ones((2, 1, 1)), 0 * v, v, jnp.array([low, high], jnp.int32), stop, jnp.int32(2))
    np.testing.assert_allclose(out[:, 0, 0], [3.5, 0.0])


def test_rows_may_stand_at_different_indices_and_see_nothing():
    """Literal: one head of one value, two rows at indices 1 and 2, the third sees nothing."""
    k = jnp.zeros((3, 1, 3, 2))
    v = jnp.broadcast_to(jnp.array([[1.0, 0], [2, 0], [6, 0]]), (3, 1, 3, 2))
    stop = jnp.array([[9, 9, 9], [9, 2, 9], [0, 0, 0]], jnp.int32)
    out = one_query_attention(jnp.ones((3, 1, 2)), k, v, jnp.zeros(3, jnp.int32), stop, jnp.array([1, 2, 2], jnp.int32))
    np.testing.assert_allclose(out[:, 0, 0], [1.5, 3.5, 0.0])
