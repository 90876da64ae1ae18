"""Interval attention without an accelerator kernel: the mask, the dense reference and the chunked implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import attention_oracle as oracle
from vocojax.kernels.interval_attention import IntervalMask, chunked, interval_attention

# (queries, keys, query heads, key/value heads, head width, chunk): with and without a prefix, ragged and whole chunks
SHAPES = [
    (40, 40, 4, 4, 8, 512),
    (40, 40, 4, 2, 8, 16),
    (40, 40, 6, 1, 5, 11),
    (13, 40, 4, 2, 8, 8),
    (1, 40, 2, 1, 8, 16),
]


@functools.cache
def compiled(implementation: str, chunk: int):
    """Value and gradients as one jitted function; the chunk size is read while it is traced."""

    def value_and_gradients(q, k, v, start, stop, dout):
        mask = IntervalMask(start, stop)
        out, vjp = jax.vjp(lambda *qkv: interval_attention(*qkv, mask, implementation=implementation), q, k, v)
        return out, *vjp(dout)

    jitted = jax.jit(value_and_gradients)

    def call(*args):
        size, chunked.CHUNK = chunked.CHUNK, chunk
        try:
            return jitted(*args)
        finally:
            chunked.CHUNK = size

    return call


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_on_random_packings(shape, implementation):
    Q, K, H, G, D, chunk = shape

    @oracle.QUICK
    @given(st.lists(oracle.packed_rows(K), min_size=2, max_size=2), st.integers(0, 2**31))
    def check(rows, seed):
        start, stop, visible = oracle.masks(rows, Q)
        np.testing.assert_array_equal(IntervalMask(jnp.asarray(start), jnp.asarray(stop)).dense(), visible)
        q, k, v, dout = oracle.normal(seed, (2, Q, H, D), (2, K, G, D), (2, K, G, D), (2, Q, H, D))
        got = compiled(implementation, chunk)(q, k, v, start, stop, dout)
        want = (
            oracle.attention(q, k, v, visible, D**-0.5)[0],
            *oracle.attention_gradients(q, k, v, visible, D**-0.5, dout),
        )
        for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5, err_msg=name)

    check()


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_what_nobody_sees_may_hold_anything(implementation, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 8)
    oracle.check_garbage_is_ignored(13, 40, 4, 2, 8, implementation)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_a_visible_nan_is_not_hidden(implementation):
    q, k, v = oracle.normal(0, (1, 6, 2, 4), (1, 6, 2, 4), (1, 6, 2, 4))
    v[0, 2] = np.nan
    out = interval_attention(q, k, v, IntervalMask.causal(1, 6), implementation=implementation)
    assert np.isnan(np.asarray(out)[0, 2:]).all()


@pytest.mark.parametrize(("queries", "prefix"), [(1, 0), (1, 8), (16, 0), (33, 20), (70, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_liveness_is_exact_for_arbitrary_vectors(queries, prefix, seed):
    rng, K = np.random.default_rng(seed), queries + prefix
    start = rng.integers(-1, K + 2, (2, queries)).astype(np.int32)
    stop = rng.integers(-1, K + 2, (2, K)).astype(np.int32)
    mask = IntervalMask(jnp.asarray(start), jnp.asarray(stop))
    dense = np.asarray(mask.dense())
    np.testing.assert_array_equal(mask.live_queries(), dense.any(2))
    np.testing.assert_array_equal(mask.live_keys(), dense.any(1))


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 12)])
def test_liveness_and_dense_are_exact_for_all_of_int32(queries, keys):
    @settings(oracle.QUICK, max_examples=100)
    @given(oracle.any_vectors(queries, keys))
    def check(vectors):
        mask, visible = IntervalMask(*map(jnp.asarray, vectors)), oracle.visible_by_rule(*vectors)
        dense, live_queries, live_keys = liveness(mask)
        np.testing.assert_array_equal(dense, visible)
        np.testing.assert_array_equal(live_queries, visible.any(2))
        np.testing.assert_array_equal(live_keys, visible.any(1))

    liveness = jax.jit(lambda mask: (mask.dense(), mask.live_queries(), mask.live_keys()))
    check()


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_value_and_gradients_for_all_of_int32(implementation):
    Q, K, H, G, D, chunk = SHAPES[3]

    @oracle.QUICK
    @given(oracle.any_vectors(Q, K), st.integers(0, 2**31))
    def check(vectors, seed):
        visible = oracle.visible_by_rule(*vectors)
        q, k, v, dout = oracle.normal(seed, (2, Q, H, D), (2, K, G, D), (2, K, G, D), (2, Q, H, D))
        got = compiled(implementation, chunk)(q, k, v, *vectors, dout)
        want = (oracle.attention(q, k, v, visible, D**-0.5)[0],
                *oracle.attention_gradients(q, k, v, visible, D**-0.5, dout))
        for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5, err_msg=name)

    check()


def test_no_lower_bound_and_no_upper_bound():
    """Literal: "no lower bound" is the smallest int32, "never again" the largest; every query sees all before it."""
    mask = IntervalMask(jnp.full((1, 4), -(2**31), jnp.int32), jnp.full((1, 4), 2**31 - 1, jnp.int32))
    values = jnp.array([1.0, 2, 3, 4]).reshape(1, 4, 1, 1)
    for implementation in ("reference", "chunked"):
        out = interval_attention(values * 0, values * 0, values, mask, implementation=implementation)
        np.testing.assert_allclose(out[0, :, 0, 0], [1, 1.5, 2, 2.5], rtol=1e-6)


def test_causal_constructor():
    np.testing.assert_array_equal(IntervalMask.causal(2, 5).dense(), np.tril(np.ones((2, 5, 5), bool)))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_bfloat16_keeps_its_type_and_accumulates_in_float32(implementation):
    S, D = 300, 16
    q, k, v = (x.astype(jnp.bfloat16) for x in oracle.normal(1, (1, S, 2, D), (1, S, 2, D), (1, S, 2, D)))
    mask = IntervalMask.causal(1, S)
    out = interval_attention(q, k, v, mask, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    want, _ = oracle.attention(q, k, v, np.asarray(mask.dense()), D**-0.5)
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.02)


def test_a_scale_is_used():
    q, k, v = oracle.normal(2, (1, 9, 2, 4), (1, 9, 1, 4), (1, 9, 1, 4))
    mask = IntervalMask.causal(1, 9)
    want, _ = oracle.attention(q, k, v, np.asarray(mask.dense()), 0.1)
    for implementation in ("reference", "chunked"):
        got = interval_attention(q, k, v, mask, scale=0.1, implementation=implementation)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_chunked_never_holds_the_square_of_the_sequence():
    S, H, D = 4096, 2, 8
    x = jax.ShapeDtypeStruct((1, S, H, D), jnp.float32)
    mask = IntervalMask.causal(1, S)
    loss = lambda q, k, v: interval_attention(q, k, v, mask, implementation="chunked").sum()
    memory = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < S * S * H  # a quarter of one float32 S x S array per head


@pytest.mark.parametrize(("length", "count", "size"), [(40, 1, 40), (128, 1, 128), (129, 2, 65), (709, 6, 119)])
def test_chunks_are_even(length, count, size):
    """Literal: as few chunks as 128 positions each allow, and hardly any padding."""
    assert chunked._positions(jnp.zeros((2, length, 3))).shape == (count, 2, size, 3)


def test_a_policy_that_saves_both_names_runs_the_forward_pass_once():
    S = 16
    q, k, v = oracle.normal(3, (1, S, 2, 4), (1, S, 2, 4), (1, S, 2, 4))
    mask = IntervalMask.causal(1, S)

    def products(names: tuple[str, ...]) -> int:
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        block = jax.checkpoint(lambda *x: interval_attention(*x, mask, implementation="chunked"), policy=policy)
        return str(jax.make_jaxpr(jax.grad(lambda *x: block(*x).sum()))(q, k, v)).count("dot_general[")

    forward, backward, scores = 2, 5, 1
    assert products(("attention_out", "attention_lse")) == forward + backward
    assert products(("attention_out",)) == forward + scores + backward
    assert products(()) == forward + forward + backward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=(1, 8, 4)), "q must be"),
        (dict(k=(2, 8, 2, 4)), "k has shape"),
        (dict(v=(1, 8, 1, 4)), "v has shape"),
        (dict(k=(1, 8, 3, 4), v=(1, 8, 3, 4)), "multiple"),
        (dict(k=(1, 7, 2, 4), v=(1, 7, 2, 4), stop=(1, 7)), "7 keys for 8 queries"),
        (dict(start=(1, 7)), "mask.start has shape"),
        (dict(stop=(2, 8)), "mask.stop has shape"),
        (dict(implementation="flash"), "implementation='flash'"),
    ],
    ids=str,
)
def test_wrong_shapes_and_names_say_which(change, message):
    shapes = dict(q=(1, 8, 4, 4), k=(1, 8, 2, 4), v=(1, 8, 2, 4), start=(1, 8), stop=(1, 8)) | change
    implementation = shapes.pop("implementation", None)
    q, k, v, start, stop = (jnp.zeros(s, jnp.int32 if n in ("start", "stop") else None) for n, s in shapes.items())
    with pytest.raises(ValueError, match=message):
        interval_attention(q, k, v, IntervalMask(start, stop), implementation=implementation)


def test_wrong_types_say_which():
    x, mask = jnp.zeros((1, 8, 2, 4)), IntervalMask.causal(1, 8)
    with pytest.raises(ValueError, match="k is bfloat16 but q is float32"):
        interval_attention(x, x.astype(jnp.bfloat16), x, mask)
    with pytest.raises(ValueError, match="q must be floating point"):
        interval_attention(x.astype(jnp.int32), x, x, mask)
    with pytest.raises(ValueError, match=r"mask.start must be int32"):
        interval_attention(x, x, x, IntervalMask(mask.start.astype(jnp.float32), mask.stop))
