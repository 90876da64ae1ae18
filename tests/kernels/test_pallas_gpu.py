"""The GPU kernels without a GPU: interpreted on the CPU for their values, compiled by XLA for Ampere and Hopper."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import attention_oracle as oracle
from vocojax.costs.topologies import Topology
from vocojax.devices import GPUS
from vocojax.kernels.interval_attention import IntervalMask, api, gpu_blocks, pallas_gpu
from vocojax.kernels.interval_attention.gpu_blocks import Blocks

# A program for a device that is not there can be written to the suite's compilation cache but not read from it.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")

FEW = settings(oracle.QUICK, max_examples=4)
SQUARE, TALL, WIDE = Blocks(16, 16, 4, 2), Blocks(32, 16, 4, 2), Blocks(16, 32, 4, 2)

# (queries, keys, query heads, key/value heads, head width, blocks of the forward pass, of dq, of dk and dv)
SHAPES = [
    (64, 64, 2, 2, 16, SQUARE, SQUARE, SQUARE),
    (50, 77, 4, 2, 24, WIDE, TALL, SQUARE),  # ragged, a prefix, two query heads per key/value head, padded heads
    (50, 50, 4, 1, 16, TALL, SQUARE, WIDE),
    (1, 40, 2, 2, 16, SQUARE, SQUARE, SQUARE),  # one token read from a cache
]


@functools.cache
def interpreted(shape: tuple):
    """Forward and backward of one shape as a jitted function on the CPU."""
    *_, width, forward_blocks, dq_blocks, dkv_blocks = shape
    options = dict(architecture="hopper", interpret=True)

    @jax.jit
    def run(q, k, v, start, stop, dout):
        mask, scale = IntervalMask(start, stop), width**-0.5
        out, lse = pallas_gpu.forward(q, k, v, mask, scale, blocks=forward_blocks, **options)
        blocks = dict(dq_blocks=dq_blocks, dkv_blocks=dkv_blocks)
        return out, *pallas_gpu.backward(q, k, v, mask, out, lse, dout, scale, **blocks, **options)

    return run


def assert_right(shape, seed, start, stop, visible):
    Q, K, H, G, D, *_ = shape
    q, k, v, dout = oracle.normal(seed, (2, Q, H, D), (2, K, G, D), (2, K, G, D), (2, Q, H, D))
    dout[~visible.any(2)] = 0  # what interval_attention hands to a kernel for rows that see nothing
    got = interpreted(shape)(q, k, v, start, stop, dout)
    want = (
        oracle.attention(q, k, v, visible, D**-0.5)[0],
        *oracle.attention_gradients(q, k, v, visible, D**-0.5, dout),
    )
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5, err_msg=name)
    out, dq, dk, dv = map(np.asarray, got)
    assert not out[~visible.any(2)].any() and not dq[~visible.any(2)].any()
    assert not dk[~visible.any(1)].any() and not dv[~visible.any(1)].any()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s[:5])))
def test_value_and_gradients_on_random_packings(shape):
    @FEW
    @given(st.lists(oracle.packed_rows(shape[1]), min_size=2, max_size=2), st.integers(0, 2**31))
    def check(rows, seed):
        assert_right(shape, seed, *oracle.masks(rows, shape[0]))

    check()


def test_value_and_gradients_for_all_of_int32():
    shape = SHAPES[1]

    @FEW
    @given(oracle.any_vectors(*shape[:2]), st.integers(0, 2**31))
    def check(vectors, seed):
        assert_right(shape, seed, *vectors, oracle.visible_by_rule(*vectors))

    check()


def test_full_tiles_are_walked():
    mask = IntervalMask.causal(2, 64)
    assert_right(SHAPES[0], 2, np.asarray(mask.start), np.asarray(mask.stop), np.asarray(mask.dense()))


def test_what_nobody_sees_may_hold_anything(monkeypatch):
    forward = functools.partial(pallas_gpu.forward, architecture="hopper", blocks=SQUARE, interpret=True)
    backward = functools.partial(
        pallas_gpu.backward, architecture="hopper", dq_blocks=SQUARE, dkv_blocks=SQUARE, interpret=True
    )
    monkeypatch.setattr(api, "_kernel", lambda _: api.Kernel(forward, backward))
    oracle.check_garbage_is_ignored(13, 40, 4, 2, 16, "pallas_gpu")


VARIANTS = {
    "heads of 128": (2, 2048, 2048, 8, 8, 128, jnp.bfloat16),
    "wide heads": (1, 2048, 2048, 4, 4, 256, jnp.bfloat16),
    "grouped, narrow heads, a prefix": (2, 600, 2048, 16, 4, 72, jnp.bfloat16),
    "heads of 64": (1, 2048, 2048, 4, 4, 64, jnp.bfloat16),
    "float32": (1, 2048, 2048, 4, 4, 128, jnp.float32),
}


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax-cuda13-plugin is not installed: pip install -e '.[cuda]'",
)
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(
    "variant",
    ["heads of 128", "wide heads", *(pytest.param(v, marks=pytest.mark.slow) for v in list(VARIANTS)[2:])],
)
def test_compiles_every_variant(target, variant):
    (device,) = Topology(f"{target}:1").devices()
    rows, queries, keys, heads, kv_heads, width, dtype = VARIANTS[variant]
    architecture = gpu_blocks.architecture(device.device_kind)
    assert architecture == {"a100": "ampere", "h100": "hopper"}[target]
    on = jax.sharding.SingleDeviceSharding(device)
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=on)
    q, k = array(rows, queries, heads, width), array(rows, keys, kv_heads, width)
    mask = IntervalMask(array(rows, queries, dtype=jnp.int32), array(rows, keys, dtype=jnp.int32))

    def run(q, k, v, mask, dout):
        out, lse = pallas_gpu.forward(q, k, v, mask, 0.1, architecture=architecture)
        return out, pallas_gpu.backward(q, k, v, mask, out, lse, dout, 0.1, architecture=architecture)

    text = jax.jit(run).lower(q, k, k, mask, q).compile().as_text()
    for name in ("interval_attention_forward", "interval_attention_dq", "interval_attention_dkv"):
        assert name in text
