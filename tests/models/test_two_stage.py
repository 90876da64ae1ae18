"""Compress, place and read as differentiable functions: the gradient of a single pass, for any units and texts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vocojax.inference.prompts import text_prompts, whole_rows
from vocojax.layout import Span, UnitShape, lay_out_sample, lay_out_unit
from vocojax.models import two_stage
from vocojax.models.parameters import parameters_of

MOST_UNITS, MOST_TEXT, ROWS = 3, 12, 2


def loss(hidden_BSE, text_start_B, lengths_B, weights_TE):
    """A weighted sum over the hidden states of the text, up to MOST_TEXT tokens of each row."""
    index_BT = text_start_B[:, None] + jnp.arange(MOST_TEXT)
    text_BTE = jnp.take_along_axis(hidden_BSE, index_BT[..., None], axis=1)
    return (jnp.where((jnp.arange(MOST_TEXT) < lengths_B[:, None])[..., None], text_BTE, 0) * weights_TE).sum()


@jax.jit
@jax.value_and_grad
def single_pass(model, rows, text_start_B, lengths_B, weights_TE):
    return loss(model(rows)[0], text_start_B, lengths_B, weights_TE)


@functools.partial(jax.jit, static_argnames="keep")
@jax.value_and_grad
def two_stages(model, units, text, units_BT, lengths_B, weights_TE, keep):
    units = two_stage.compress(model, units, keep, remat="full")
    prefix = two_stage.place(units, units_BT, model.config.decoder, stride=keep)
    hidden_BSE, _ = two_stage.read(model, text, prefix)
    return loss(hidden_BSE, jnp.zeros_like(lengths_B), lengths_B, weights_TE)


@settings(max_examples=8, deadline=None)
@given(vocos=st.sampled_from([1, 3]), fewer=st.integers(1, MOST_UNITS), lengths=st.tuples(*[st.integers(1, 8)] * ROWS),
       seed=st.integers(0, 99))
def test_gradients_are_those_of_the_single_pass(tiny_model, words, vocos, fewer, lengths, seed):
    """Decoder, projector and the <voco> row, for k units (one row has fewer), N VoCo tokens and texts of any length."""
    config, random = tiny_model.config, np.random.default_rng(seed)
    unit = UnitShape(config.unit_tokens, vocos)
    samples = [lay_out_sample("x", k, [[Span("red " * length)]], words, unit, 200)
               for k, length in zip((MOST_UNITS, fewer), lengths, strict=True)]
    images = [list(random.integers(0, 255, (s.num_units, 32, 32, 3), dtype=np.uint8)) for s in samples]
    weights_TE = jnp.array(random.normal(size=(MOST_TEXT, config.decoder.width)), jnp.float32)
    text_start_B = jnp.array([s.text_start for s in samples])
    lengths_B = jnp.array([len(s) for s in samples]) - text_start_B

    on_device = functools.partial(jax.tree.map, jnp.asarray)
    whole = on_device(whole_rows(samples, images, config, "voco", MOST_UNITS * 9 + 2 * MOST_TEXT))
    alone = lay_out_unit("unit", words, unit)
    flat = [image for own in images for image in own] + [images[0][0]] * (MOST_UNITS - fewer)  # a fixed number of units
    units = on_device(whole_rows([alone] * len(flat), [[image] for image in flat], config, "voco", len(alone)))
    text = on_device(text_prompts(samples, "voco", MOST_UNITS * vocos, MOST_TEXT).rows)
    units_BT = jnp.array([[0, 1, 2], [3 + t if t < fewer else -1 for t in range(MOST_UNITS)]])

    value, gradient = single_pass(tiny_model, whole, text_start_B, lengths_B, weights_TE)
    cached_value, cached = two_stages(tiny_model, units, text, units_BT, lengths_B, weights_TE, keep=vocos)
    np.testing.assert_allclose(cached_value, value, rtol=1e-4, atol=1e-3)
    expected, found = parameters_of(gradient), parameters_of(cached)
    expected["voco_row"], found["voco_row"] = (g["decoder/embedding"][config.voco.token_id] for g in (expected, found))
    for name in expected:
        if name.startswith(("decoder/", "projector/", "voco_row")):
            largest = np.abs(expected[name]).max()
            assert largest > 0 or name.startswith(("decoder/norm", "decoder/head")), name
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4 * float(largest), err_msg=name)
