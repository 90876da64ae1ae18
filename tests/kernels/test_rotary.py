"""Rotary positions against rotations of complex numbers, by XLA and by the TPU kernel (interpreted)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocojax.kernels.rotary import Rotation, pallas_tpu, rotate
from vocojax.models.llama import rope_frequencies


def frequencies(width):
    return rope_frequencies(width, 10000.0, None)


def arrays(dtype, width, rows=2, length=5, heads=3):
    random = np.random.default_rng(0)
    x, grad = (jnp.array(random.normal(size=(rows, length, heads, width)), dtype) for _ in range(2))
    return x, grad, jnp.array(random.integers(0, 4000, (rows, length)), jnp.int32)


def by_complex_numbers(x, positions, sign=1):
    """In float64: the pair (d, d + D/2) as one number."""
    half = x.shape[-1] // 2
    x = np.asarray(x, np.float64)
    angles = (np.asarray(positions, np.float32)[..., None, None] * frequencies(2 * half)).astype(np.float64)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * sign * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize(("dtype", "relative"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
# Three heads of 16 fill no register.
@pytest.mark.parametrize(("implementation", "width"), [("xla", 16), ("pallas_tpu", 16), ("pallas_tpu", 128)])
def test_values_and_gradients_are_rounded_once(dtype, relative, implementation, width, monkeypatch):
    """Half a unit in the last place of bfloat16, which has 8 bits, and no more."""
    monkeypatch.setattr(pallas_tpu, "rotate", functools.partial(pallas_tpu.rotate, interpret=True))
    x, grad, positions = arrays(dtype, width)
    rotation = Rotation.of(positions, frequencies(width))
    got, back = jax.vjp(lambda x: rotate(x, rotation, implementation=implementation), x)
    assert got.dtype == dtype and back(grad)[0].dtype == dtype
    expected, expected_grad = by_complex_numbers(x, positions), by_complex_numbers(grad, positions, sign=-1)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=relative, atol=5e-6)
    np.testing.assert_allclose(np.asarray(back(grad)[0], np.float64), expected_grad, rtol=relative, atol=5e-6)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 70), st.sampled_from([(1, 128), (3, 128), (2, 256), (2, 64), (8, 32)]))
def test_the_kernel_takes_any_number_of_tokens(rows, length, heads_width):
    """Blocks of 16 tokens, the last of which hangs over the end; registers of one, two and four heads."""
    heads, width = heads_width
    assert pallas_tpu.takes(heads, width)
    x, _, positions = arrays(jnp.float32, width, rows, length, heads)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pallas_tpu, "BLOCK_BYTES", 1)
        got = pallas_tpu.rotate(x, *Rotation.of(positions, frequencies(width)), interpret=True)[0]
    np.testing.assert_allclose(got, by_complex_numbers(x, positions), rtol=1e-6, atol=5e-6)


def test_rotations_compose_and_go_back():
    x, _, positions = arrays(jnp.float32, 16)
    by = lambda positions: Rotation.of(positions, frequencies(16))
    twice = rotate(rotate(x, by(positions)), by(jnp.full_like(positions, 7)))
    np.testing.assert_allclose(twice, rotate(x, by(positions + 7)), atol=1e-3)  # fp32 angles of some 4,000 radians
    np.testing.assert_allclose(rotate(rotate(x, by(positions)), by(positions).back), x, atol=1e-6)


def test_the_kernel_is_taken_where_attention_is_and_heads_fill_registers(monkeypatch):
    taken = []
    monkeypatch.setattr(pallas_tpu, "rotate", lambda x, *tables: taken.append(x.shape[2:]) or (x,))
    for heads, width in ((3, 64), (2, 64), (1, 128), (2, 72), (2, 192)):
        x, _, positions = arrays(jnp.float32, width, heads=heads)
        for implementation in ("pallas_tpu", "chunked", "pallas_gpu", "xla", None):
            rotate(x, Rotation.of(positions, frequencies(width)), implementation=implementation)
    assert taken == [(2, 64), (1, 128)], "and the backend of this test is no TPU"


def test_the_kernel_refuses_a_rotation_of_other_tokens():
    x, _, positions = arrays(jnp.float32, 128)
    with pytest.raises(ValueError, match=r"rotation is \(1, 5, 128\), but x \(2, 5, 3, 128\)"):
        rotate(x, Rotation.of(positions[:1], frequencies(128)), implementation="pallas_tpu")
