"""Rotary positions against rotations of complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vocojax.models.llama import rope_frequencies, rotate

WIDTH = 16
FREQUENCIES = rope_frequencies(WIDTH, 10000.0, None)


def arrays(dtype):
    random = np.random.default_rng(0)
    x, grad = (jnp.array(random.normal(size=(2, 5, 3, WIDTH)), dtype) for _ in range(2))
    return x, grad, jnp.array(random.integers(0, 4000, (2, 5)), jnp.int32)


def by_complex_numbers(x, positions, sign=1):
    """In float64: the pair (d, d + D/2) as one number."""
    x = np.asarray(x, np.float64)
    angles = (np.asarray(positions, np.float32)[..., None, None] * FREQUENCIES).astype(np.float64)
    turned = (x[..., : WIDTH // 2] + 1j * x[..., WIDTH // 2 :]) * np.exp(1j * sign * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize(("dtype", "relative"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_values_and_gradients_are_rounded_once(dtype, relative):
    """Half a unit in the last place of bfloat16, which has 8 bits, and no more."""
    x, grad, positions = arrays(dtype)
    got, back = jax.vjp(lambda x: rotate(x, positions, FREQUENCIES), x)
    assert got.dtype == dtype
    expected, expected_grad = by_complex_numbers(x, positions), by_complex_numbers(grad, positions, sign=-1)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=relative, atol=5e-6)
    np.testing.assert_allclose(np.asarray(back(grad)[0], np.float64), expected_grad, rtol=relative, atol=5e-6)
