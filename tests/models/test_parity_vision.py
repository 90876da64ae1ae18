"""The vision towers, the projector and the Q-Former against transformers, layer by layer, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from tests.helpers.parity import assert_close, fill_qformer, filled, randomise
from vocojax.config import CompressorConfig, DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig, VocoConfig
from vocojax.convert.tables import clip_rules, eva_rules, projector_rules
from vocojax.models.clip import ClipVision
from vocojax.models.compressors import QFormer
from vocojax.models.eva import EvaVision
from vocojax.models.projector import Projector
from vocojax.models.voco import VocoLlama

SIZES = {"image_size": 28, "patch_size": 7, "width": 32, "depth": 4, "num_heads": 2, "mlp_width": 80}
HF_SIZES = {"image_size": 28, "patch_size": 7, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
            "intermediate_size": 80}


def some_pixels(count=3, size=28):
    """Normalised pixels [U, H, W, 3] and the same for torch."""
    pixels = np.random.default_rng(0).standard_normal((count, size, size, 3)).astype(np.float32)
    return jnp.asarray(pixels), torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("select_layer", [-4, -3, -2, -1])
def test_clip_hidden_states(select_layer):
    theirs = randomise(CLIPVisionModel(CLIPVisionConfig(**HF_SIZES)))
    config = VisionConfig(**SIZES, select_layer=select_layer)
    ours = filled(ClipVision(config, nnx.Rngs(0)), clip_rules(config, ""), theirs.state_dict(), "vision/")
    pixels, torch_pixels = some_pixels()
    hidden = theirs(torch_pixels, output_hidden_states=True).hidden_states
    assert len(hidden) == config.depth + 1
    assert_close(jax.jit(ours.hidden)(pixels), hidden[select_layer], f"hidden state {select_layer}")
    assert jax.eval_shape(ours, pixels).shape == (3, 16, 32)


def test_clip_pooled_and_gradients():
    theirs = randomise(CLIPVisionModel(CLIPVisionConfig(**HF_SIZES)))
    config = VisionConfig(**SIZES)
    ours = filled(ClipVision(config, nnx.Rngs(0)), clip_rules(config, ""), theirs.state_dict(), "vision/")
    pixels, torch_pixels = some_pixels()
    torch_pixels.requires_grad_()
    pooled = theirs(torch_pixels).pooler_output
    pooled.square().sum().backward()
    assert_close(jax.jit(ours.pooled)(pixels), pooled, "pooled feature")
    gradient = jax.jit(jax.grad(lambda x: jnp.square(ours.pooled(x)).sum()))(pixels)
    assert_close(gradient.transpose(0, 3, 1, 2), torch_pixels.grad, "gradient of the pixels")


EVA_NAMES = (
    ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers", "blocks"),
    ("self_attn.projection", "attn.proj"), ("self_attn", "attn"), ("layer_norm", "norm"),
)


def eva_state_dict(blip: Blip2VisionModel) -> dict[str, torch.Tensor]:
    """A BLIP-2 vision model of transformers under the names of the EVA-CLIP files, its fused bias taken apart."""
    renamed = {}
    for name, tensor in blip.state_dict().items():
        for theirs, published in EVA_NAMES:
            name = name.replace(theirs, published)
        if name.endswith("qkv.bias"):
            query, key, value = tensor.chunk(3)
            assert not key.any()  # what the published weights have
            renamed[name.replace("qkv.bias", "q_bias")] = query
            renamed[name.replace("qkv.bias", "v_bias")] = value
        elif not name.startswith("post_layernorm"):
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_eva_hidden_states(depth):
    theirs = randomise(Blip2VisionModel(Blip2VisionConfig(**HF_SIZES)))
    for layer in theirs.encoder.layers:
        layer.self_attn.qkv.bias.data[32:64] = 0
    tensors = {name: tensor for name, tensor in eva_state_dict(theirs).items()
               if not name.startswith("blocks.") or int(name.split(".")[1]) < depth}
    config = VisionConfig(**{**SIZES, "depth": depth}, kind="eva", select_layer=-1, norm_eps=1e-6)
    ours = filled(EvaVision(config, nnx.Rngs(0)), eva_rules(config, ""), tensors, "vision/")
    pixels, torch_pixels = some_pixels()
    hidden = theirs(torch_pixels, output_hidden_states=True).hidden_states
    # The last of these is taken before post_layernorm.
    assert_close(jax.jit(ours.hidden)(pixels), hidden[depth], f"output of block {depth - 1}")
    assert jax.eval_shape(ours, pixels).shape == (3, 16, 32)


def test_mlp_projector():
    config = LlavaConfig(vision_config=CLIPVisionConfig(**HF_SIZES).to_dict(),
                         text_config={"model_type": "llama", "hidden_size": 48, "num_attention_heads": 2})
    theirs = randomise(LlavaMultiModalProjector(config))
    projector = ProjectorConfig("mlp2x_gelu")
    ours = filled(Projector(projector, 32, 48, nnx.Rngs(0)), projector_rules(projector, "linear_1", "linear_2"),
                  theirs.state_dict(), "projector/")
    features = np.random.default_rng(1).standard_normal((2, 5, 32)).astype(np.float32)
    assert_close(ours(jnp.asarray(features)), theirs(torch.from_numpy(features)), "projected features")


def test_linear_projector():
    theirs = randomise(torch.nn.Linear(32, 48))
    projector = ProjectorConfig("linear")
    state_dict = {f"mm_projector.{name}": tensor for name, tensor in theirs.state_dict().items()}
    ours = filled(Projector(projector, 32, 48, nnx.Rngs(0)), projector_rules(projector, "mm_projector", "unused"),
                  state_dict, "projector/")
    features = np.random.default_rng(1).standard_normal((2, 5, 32)).astype(np.float32)
    assert_close(ours(jnp.asarray(features)), theirs(torch.from_numpy(features)), "projected features")


@pytest.mark.parametrize("every", [1, 2])
def test_qformer(every):
    depth, vision_width = 4, 24
    theirs = randomise(Blip2QFormerModel(Blip2QFormerConfig(
        hidden_size=32, num_hidden_layers=depth, num_attention_heads=2, intermediate_size=80,
        cross_attention_frequency=every, encoder_hidden_size=vision_width)))
    config = CompressorConfig("qformer", num_tokens=3, depth=depth, width=32, num_heads=2, mlp_width=80,
                              cross_attention_every=every)
    ours = QFormer(config, vision_width, nnx.Rngs(0))
    fill_qformer(ours, theirs.state_dict(), depth, every)

    features = np.random.default_rng(2).standard_normal((2, 7, vision_width)).astype(np.float32)
    normed = torch.nn.functional.layer_norm(torch.from_numpy(features), (vision_width,), eps=1e-5)
    queries = torch.from_numpy(np.array(ours.queries[...])).expand(2, -1, -1)
    expected = theirs(query_embeds=queries, encoder_hidden_states=normed).last_hidden_state
    assert_close(jax.jit(ours)(features), expected, "Q-Former output")


def test_eva_in_the_whole_model():
    """The tower that a config names is the one that images go through."""
    config = ModelConfig(
        VisionConfig(**{**SIZES, "depth": 2}, kind="eva", select_layer=-1, norm_eps=1e-6),
        decoder=DecoderConfig(vocab_size=64, width=48, depth=1, num_heads=2, num_kv_heads=2, head_width=24,
                              mlp_width=64),
        voco=VocoConfig(token_id=63),
    )
    model = VocoLlama(config, nnx.Rngs(0), jnp.float32)
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3)).astype(np.uint8)
    tokens = jax.jit(model.encode_images)(images)
    assert isinstance(model.vision, EvaVision) and tokens.shape == (2, 16, 48)
    assert float(jnp.abs(tokens[0] - tokens[1]).max()) > 1e-3
