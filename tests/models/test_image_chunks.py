"""Slots without an image skip the vision tower; everything that is read stays as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vocojax.inference.prompts import whole_rows
from vocojax.layout import Span, lay_out_sample, unit_shape
from vocojax.models.image_chunks import ImageChunks, run_filled
from vocojax.models.voco import VocoLlama

IMAGES = list(np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8))


class Scale(nnx.Module):
    """A layer."""

    def __init__(self):
        self.factor = nnx.Param(jnp.float32(3.0))

    def __call__(self, x_USE: jax.Array) -> jax.Array:
        return x_USE * self.factor[...]


def test_images_come_first():
    vision_BS = jnp.array([[-1, 0, 1, -1], [-1, -1, -1, -1], [4, 5, 2, 3]])  # of 2 tokens: slot 0; none; slots 2 and 1
    chunks = ImageChunks.of(vision_BS, slots=3, tokens=2, axes=())
    assert chunks.order_A.tolist() == [0, 7, 8, 1, 2, 3, 4, 5, 6]
    assert chunks.place_A.tolist() == [0, 3, 4, 5, 6, 7, 8, 1, 2]
    assert (int(chunks.filled), chunks.size) == (1, 3)


@pytest.mark.parametrize(("filled", "out", "grad"), [(0, [1, 1, 1], 0), (2, [3, 3, 1], 4), (3, [3, 3, 3], 6)])
def test_empty_chunks_do_not_run(filled, out, grad):
    """Three chunks of two images whose state is 1."""
    place_A = jnp.arange(6)

    def total(layer: Scale) -> tuple[jax.Array, jax.Array]:
        x_ASE = run_filled(layer, jnp.ones((6, 1, 1)), ImageChunks(place_A, place_A, jnp.int32(filled), 2))
        return x_ASE.sum(), x_ASE

    gradient, x_ASE = nnx.grad(total, has_aux=True)(Scale())
    assert x_ASE[::2, 0, 0].tolist() == x_ASE[1::2, 0, 0].tolist() == out
    assert float(gradient.factor[...]) == grad


def test_tokens_and_gradients_are_those_of_all_slots(tiny_model, words):
    """Rows of three images, of none and of one: four of nine slots, so two chunks of three."""
    unit = unit_shape(tiny_model.config)
    samples = [lay_out_sample(str(images), images, [[Span("red green")]], words, unit, 100)
               for images in (3, 0, 1)]
    rows = whole_rows(samples, [IMAGES[:3], [], IMAGES[3:]], tiny_model.config, "voco", 80)
    rows = jax.tree.map(jnp.asarray, rows)
    weights_BSE = jax.random.normal(jax.random.key(0), (3, 80, 32))

    def total(model: VocoLlama, axes: tuple[str, ...] | None) -> tuple[jax.Array, jax.Array]:
        x_BSE = model.embed(rows, axes=axes)
        return (x_BSE * weights_BSE).sum(), x_BSE

    run = nnx.jit(nnx.grad(total, has_aux=True), static_argnums=1)
    (grads, x_BSE), (all_grads, all_x_BSE) = (run(tiny_model, axes) for axes in ((), None))
    np.testing.assert_allclose(x_BSE, all_x_BSE, rtol=1e-5, atol=1e-6)
    same = lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    jax.tree.map(same, grads, all_grads)
