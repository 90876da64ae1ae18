"""The baselines' compressors: downsampling against transformers and torch, windows by hand, and random draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.helpers.parity import assert_close, filled, randomise
from vocojax.config import PRESETS, CompressorConfig, VisionConfig
from vocojax.convert.tables import clip_rules
from vocojax.data.conversation import template
from vocojax.errors import InputError
from vocojax.inference.assistant import Assistant
from vocojax.models.clip import ClipVision
from vocojax.models.compressors import AveragePool, RandomTokens
from vocojax.models.voco import VocoLlama

SIZES = {"image_size": 28, "patch_size": 7}


def some_images(count, size=64):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def model_with(kind, num_tokens):
    config = dataclasses.replace(PRESETS["tiny"], compressor=CompressorConfig(kind, num_tokens))
    return VocoLlama(config, nnx.Rngs(0), jnp.float32)


@pytest.mark.parametrize("grid", [1, 2, 3, 4])
def test_a_downsampled_image_is_encoded_as_by_a_tower_of_its_size(grid):
    """transformers' tower of the smaller size, with the position embeddings and the image that torch interpolates."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 80}
    theirs = randomise(CLIPVisionModel(CLIPVisionConfig(**SIZES, **sizes)))
    config = VisionConfig(**SIZES, width=32, depth=2, num_heads=2, mlp_width=80, select_layer=-1)
    ours = filled(ClipVision(config, nnx.Rngs(0)), clip_rules(config, ""), theirs.state_dict(), "vision/")

    smaller = CLIPVisionModel(CLIPVisionConfig(image_size=7 * grid, patch_size=7, **sizes)).eval()
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if "position_ids" not in name}
    [name] = [name for name in tensors if name.endswith("position_embedding.weight")]
    resize = lambda x, size: torch.nn.functional.interpolate(x, (size, size), mode="bicubic", antialias=True)
    on_grid = tensors[name][1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    reduced = resize(on_grid, grid).permute(0, 2, 3, 1).reshape(-1, 32)
    tensors[name] = torch.cat([tensors[name][:1], reduced])
    smaller.load_state_dict(tensors)

    pixels = np.random.default_rng(0).standard_normal((3, 28, 28, 3)).astype(np.float32)
    torch_pixels = resize(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), 7 * grid)
    assert_close(jax.jit(ours, static_argnums=1)(pixels, grid), smaller(torch_pixels).last_hidden_state[:, 1:],
                 f"features of {grid}x{grid} patches")


def test_windows_of_average_pooling():
    features_UPE = jnp.arange(16.0)[None, :, None]  # 4 x 4 vision tokens, row after row
    pool = lambda num_tokens: AveragePool(CompressorConfig("avg_pool", num_tokens), 1)(features_UPE)[0, :, 0].tolist()
    assert pool(1) == [7.5]
    assert pool(4) == [2.5, 4.5, 10.5, 12.5]  # 0, 1, 4, 5; 2, 3, 6, 7; ...
    assert pool(16) == list(range(16))


@pytest.mark.parametrize("kind", ["avg_pool", "downsample", "random"])
def test_as_many_tokens_as_vision_tokens_are_all_of_them(kind):
    images, whole = some_images(2), VocoLlama(PRESETS["tiny"], nnx.Rngs(0), jnp.float32)
    np.testing.assert_array_equal(model_with(kind, 16).encode_images(images), whole.encode_images(images))
    assert model_with(kind, 4).encode_images(images).shape == (2, 4, 64)


def test_random_tokens_depend_on_the_image_and_the_step_alone():
    compressor = RandomTokens(CompressorConfig("random", 3), 1)
    images = some_images(40)
    places_UPE = jnp.broadcast_to(jnp.arange(16.0)[None, :, None], (40, 16, 1))
    draw = jax.jit(lambda images, step: compressor(places_UPE[: len(images)], images, step)[..., 0])
    drawn = np.asarray(draw(images, 0))
    assert (np.diff(drawn) > 0).all()  # different places, in their order
    assert len({tuple(row) for row in drawn.tolist()}) > 20  # of 560 possible choices
    assert set(drawn.ravel()) == set(range(16))
    np.testing.assert_array_equal(draw(images[7:9][::-1], 0), drawn[7:9][::-1])  # in another batch
    later = np.asarray(draw(images, 1))
    assert (later != drawn).any(axis=1).mean() > 0.9
    one_pixel = images[:1].copy()
    one_pixel[0, 5, 5, 1] ^= 1
    assert (np.asarray(draw(one_pixel, 0)) != drawn[:1]).any()


def test_a_baseline_s_refusal_of_a_cache_names_its_compressor(words, tiny_config):
    """Its remedy is not the VoCo mask, which these models have no tokens for."""
    config = dataclasses.replace(tiny_config, compressor=CompressorConfig("random", 1))
    assistant = Assistant(VocoLlama(config, nnx.Rngs(0), jnp.float32), words, template("short"), "causal")
    with pytest.raises(InputError) as error:
        assistant.compress(some_images(1, 32)[0])
    assert str(error.value) == ("a model with the compressor 'random' has no VoCo tokens to cache: ask by "
                                "Assistant.answer or answer_many")
