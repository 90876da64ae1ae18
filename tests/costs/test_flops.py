"""The counter on programs whose FLOPs anyone can work out."""

import jax
import jax.numpy as jnp
import pytest

from vocojax.costs.flops import CannotCount, matmul_flops

A, W = jnp.ones((32, 256)), jnp.ones((256, 256))


def count(function, *arguments):
    return matmul_flops(jax.jit(function).lower(*arguments).compile())


def test_one_product():
    assert count(jnp.matmul, A, jnp.ones((256, 64))) == 2 * 32 * 256 * 64


def test_a_batched_product_in_bfloat16():
    x, y = jnp.ones((3, 40, 16), jnp.bfloat16), jnp.ones((3, 24, 16), jnp.bfloat16)
    assert count(lambda x, y: jnp.einsum("bqd,bkd->bqk", x, y), x, y) == 2 * 3 * 40 * 24 * 16


def test_a_scan_is_counted_as_often_as_it_runs():
    """XLA's own analysis counts the body of a scan once; that is why there is a counter."""
    layers = lambda x, ws: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]
    ws = jnp.ones((7, 256, 256))
    program = jax.jit(layers).lower(A, ws).compile()
    assert matmul_flops(program) == 7 * 2 * 32 * 256 * 256
    assert program.cost_analysis()["flops"] < 2 * 2 * 32 * 256 * 256


def test_a_scan_in_a_scan_beside_a_product():
    def run(x, w):
        inner = lambda x, _: (jnp.tanh(x @ w), None)
        outer = lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0] + 1, None)
        return jax.lax.scan(outer, x, None, length=5)[0] @ jnp.ones((256, 8))

    assert count(run, A, W) == 15 * 2 * 32 * 256 * 256 + 2 * 32 * 256 * 8


def test_of_branches_the_most_expensive_counts():
    run = lambda p, x, w: jax.lax.cond(p, lambda: jnp.tanh(x @ w) @ w, lambda: x @ w)
    assert count(run, True, A, W) == 2 * 2 * 32 * 256 * 256


def test_what_cannot_be_counted_is_an_error():
    endless = lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)
    with pytest.raises(CannotCount, match="how often the loop"):
        count(endless, A, W)
    with pytest.raises(CannotCount, match="custom-call"):
        count(jnp.linalg.qr, W)
