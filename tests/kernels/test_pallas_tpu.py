"""The TPU kernels without a TPU: interpreted on the CPU for their values, compiled by libtpu for each generation."""

import functools
import importlib.util
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tests.helpers import attention_oracle as oracle
from vocojax.kernels.interval_attention import IntervalMask, api, interval_attention, pallas_tpu, tpu_blocks
from vocojax.kernels.interval_attention.tpu_blocks import Blocks
from vocojax.kernels.rotary import Rotation, rotate
from vocojax.kernels.rotary import pallas_tpu as rotary_tpu

# A program for a device that is not there can be written to the suite's compilation cache but not read from it.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")

FEW = settings(oracle.QUICK, max_examples=4)
SQUARE, TALL, WIDE = Blocks(128, 128, 256), Blocks(256, 128, 128), Blocks(128, 256, 512)
TURNED = Blocks(128, 128, 256, transposed_dq=True)
PAIRS = Blocks(128, 128, 512, together=2)
ALL = 1 << 30  # room for the dq of any row, so that it is one span

# (queries, keys, query heads, key/value heads, head width, forward blocks, backward blocks, bytes for dq)
SHAPES = [
    (256, 256, 3, 3, 64, SQUARE, PAIRS, ALL),
    (256, 256, 2, 2, 128, WIDE, TURNED, ALL),
    (300, 300, 4, 2, 72, SQUARE, WIDE, ALL),  # ragged, padded heads, two query heads per key/value head
    (200, 333, 8, 2, 128, SQUARE, SQUARE, 2 * 128 * 4 * 128 * 12),  # a prefix, heads in turns, dq in two spans
    (300, 300, 8, 1, 16, TALL, Blocks(128, 128, 256, transposed_dq=True), 128 * 8 * 128 * 12),
    (1, 300, 2, 2, 256, WIDE, SQUARE, ALL),  # one token read from a cache
]


@functools.cache
def interpreted(shape: tuple):
    """Forward and backward of one shape as a jitted function on the CPU."""
    *_, width, forward_blocks, backward_blocks, dq_bytes = shape
    options = dict(generation="v5e", interpret=True)

    @jax.jit
    def run(q, k, v, start, stop, dout):
        mask, scale = IntervalMask(start, stop), width**-0.5
        out, lse = pallas_tpu.forward(q, k, v, mask, scale, blocks=forward_blocks, **options)
        grads = pallas_tpu.backward(
            q, k, v, mask, out, lse, dout, scale, blocks=backward_blocks, dq_bytes=dq_bytes, **options
        )
        return out, *grads

    return run


def operands(seed: int, shape: tuple) -> list[np.ndarray]:
    Q, K, H, G, D, *_ = shape
    return oracle.normal(seed, (2, Q, H, D), (2, K, G, D), (2, K, G, D), (2, Q, H, D))


def assert_right(shape, seed, start, stop, visible):
    q, k, v, dout = operands(seed, shape)
    dout[~visible.any(2)] = 0  # the oracle knows no better: test_what_nobody_sees_may_hold_anything
    got = interpreted(shape)(q, k, v, start, stop, dout)
    scale = shape[4] ** -0.5
    want = (
        oracle.attention(q, k, v, visible, scale)[0],
        *oracle.attention_gradients(q, k, v, visible, scale, dout),
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


@pytest.mark.parametrize("shape", SHAPES[1:5], ids=lambda s: "-".join(map(str, s[:5])))
def test_value_and_gradients_for_arbitrary_vectors(shape):
    Q, K = shape[:2]
    rng = np.random.default_rng(0)
    start = rng.integers(-1, K, (2, Q)).astype(np.int32)
    stop = rng.integers(0, 2 * K, (2, K)).astype(np.int32)
    stop[1, : K // 2] = 0
    visible = np.asarray(IntervalMask(jnp.asarray(start), jnp.asarray(stop)).dense())
    assert_right(shape, 1, start, stop, visible)


def test_value_and_gradients_for_all_of_int32():
    shape = SHAPES[3]

    @FEW
    @given(oracle.any_vectors(*shape[:2]), st.integers(0, 2**31))
    def check(vectors, seed):
        assert_right(shape, seed, *vectors, oracle.visible_by_rule(*vectors))

    check()


def test_full_tiles_are_walked():
    shape = (256, 256, 2, 2, 128, SQUARE, SQUARE, ALL)
    mask = IntervalMask.causal(2, 256)
    assert_right(shape, 2, np.asarray(mask.start), np.asarray(mask.stop), np.asarray(mask.dense()))


TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
)


def lowered(generation: str, rows: int, queries: int, keys: int, heads: int, kv_heads: int, width: int, dtype):
    """Both passes with the table's blocks, lowered for one chip that is not there."""
    device = topologies.get_topology_desc(TOPOLOGIES[generation], platform="tpu").devices[0]
    assert tpu_blocks.generation(device.device_kind) == generation
    on = jax.sharding.SingleDeviceSharding(device)
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=on)
    q, k = array(rows, queries, heads, width), array(rows, keys, kv_heads, width)
    mask = IntervalMask(array(rows, queries, dtype=jnp.int32), array(rows, keys, dtype=jnp.int32))

    def run(q, k, v, mask, dout):
        out, lse = pallas_tpu.forward(q, k, v, mask, 0.1, generation=generation)
        return out, pallas_tpu.backward(q, k, v, mask, out, lse, dout, 0.1, generation=generation)

    return jax.jit(run).lower(q, k, k, mask, q)


@needs_libtpu
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_compiles_for_every_generation(generation):
    program = lowered(generation, 2, 2048, 2048, 8, 8, 128, jnp.bfloat16)
    for name in ("interval_attention_forward", "interval_attention_backward"):
        assert name in program.as_text()
    program.compile()


@needs_libtpu
@pytest.mark.parametrize(("generation", "heads", "width", "dtype"), [
    ("v4", 40, 128, jnp.bfloat16), ("v4", 1, 128, jnp.bfloat16), ("v5e", 8, 256, jnp.float32),
    ("v5p", 32, 64, jnp.bfloat16), ("v6e", 4, 32, jnp.bfloat16)])
def test_rotations_compile_for_every_generation(generation, heads, width, dtype):
    device = topologies.get_topology_desc(TOPOLOGIES[generation], platform="tpu").devices[0]
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(
        (2, 4100, *shape), dtype, sharding=jax.sharding.SingleDeviceSharding(device))
    table = array(width, dtype=jnp.float32)
    program = jax.jit(rotary_tpu.rotate).lower(array(heads, width), table, table)
    assert "rotary" in program.as_text()
    program.compile()


VARIANTS = {
    "grouped, narrow heads, a prefix": (2, 600, 2048, 16, 4, 72, jnp.bfloat16),
    "wide heads": (1, 2048, 2048, 4, 4, 256, jnp.bfloat16),
    "float32": (1, 1024, 1024, 4, 4, 64, jnp.float32),
    "one token from a cache": (4, 1, 2048, 8, 2, 128, jnp.bfloat16),
    "grouped in turns": (1, 2048, 2048, 64, 8, 128, jnp.bfloat16),
    "64 frames of video": (1, 16640, 16640, 8, 8, 128, jnp.bfloat16),
}


QUICK_VARIANTS = {("v5e", "grouped, narrow heads, a prefix"), ("v4", "64 frames of video"), ("v6e", "wide heads")}


@needs_libtpu
@pytest.mark.parametrize(
    ("generation", "variant"),
    [
        pytest.param(*pair, marks=() if pair in QUICK_VARIANTS else pytest.mark.slow)
        for pair in itertools.product(TOPOLOGIES, VARIANTS)
    ],
)
def test_compiles_every_variant(generation, variant):
    lowered(generation, *VARIANTS[variant]).compile()


@needs_libtpu
def test_a_mesh_of_chips_computes_its_rows_and_heads_without_a_collective():
    chips = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    mesh = Mesh(np.array(chips).reshape(2, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows, heads = PartitionSpec(("data", "fsdp")), PartitionSpec(("data", "fsdp"), None, "tensor")
    array = lambda spec, *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    q, k = array(heads, 4, 512, 4, 128), array(heads, 4, 512, 2, 128)
    mask = IntervalMask(*(array(rows, 4, 512, dtype=jnp.int32) for _ in range(2)))

    rotation = Rotation(*(array(rows, 4, 512, 128, dtype=jnp.float32) for _ in range(2)))

    def passes(q, k, v, mask, rotation):
        def attend(q, k, v):
            q, k = (rotate(x, rotation, implementation="pallas_tpu") for x in (q, k))
            return interval_attention(q, k, v, mask, implementation="pallas_tpu")

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(out)

    with jax.set_mesh(mesh):
        text = jax.jit(passes).lower(q, k, k, mask, rotation).compile().as_text()
    for kernel in ("interval_attention_forward", "interval_attention_mean", "interval_attention_backward", "rotary"):
        assert re.search(rf"%{kernel}[.\d]* = ", text), kernel
    assert not re.findall(r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute", text)


@pytest.mark.parametrize(("shape", "blocks", "dq_bytes"), [
    ((13, 200, 2, 1, 16), SQUARE, ALL),
    ((260, 300, 2, 2, 128), TURNED, ALL),
    ((260, 300, 4, 1, 72), SQUARE, 2 * 128 * 4 * 128 * 12),  # heads in turns, dq in two spans
])
def test_what_nobody_sees_may_hold_anything(shape, blocks, dq_bytes, monkeypatch):
    options = dict(generation="v5e", blocks=blocks, interpret=True)
    forward = functools.partial(pallas_tpu.forward, **options)
    backward = functools.partial(pallas_tpu.backward, dq_bytes=dq_bytes, **options)
    monkeypatch.setattr(api, "_kernel", lambda _: api.Kernel(forward, backward))
    oracle.check_garbage_is_ignored(*shape, "pallas_tpu")
