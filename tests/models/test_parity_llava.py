"""The decoder and the whole LLaVA against transformers in float32: layer by layer, logits, gradients of the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from tests.helpers.parity import TorchTensors, assert_close, filled, randomise
from vocojax.config import DecoderConfig, ModelConfig, ProjectorConfig, RopeScalingConfig, VisionConfig, VocoConfig
from vocojax.convert.mapped import MappedWeights
from vocojax.convert.mapping import Table
from vocojax.convert.tables import clip_rules, decoder_rules, projector_rules
from vocojax.kernels.interval_attention import IntervalMask
from vocojax.models.clip import CLIP_MEAN, CLIP_STD
from vocojax.models.llama import Decoder
from vocojax.models.voco import Rows, VocoLlama
from vocojax.pretrained.source import parameter_shapes

PLAIN = DecoderConfig(vocab_size=99, width=32, depth=3, num_heads=4, num_kv_heads=4, head_width=8, mlp_width=72)
DECODERS = {
    "multi_head": PLAIN,
    "grouped_query": dataclasses.replace(PLAIN, num_kv_heads=2, rope_theta=500000.0),
    "multi_query_wide_heads": dataclasses.replace(PLAIN, num_kv_heads=1, head_width=16),
    "tied": dataclasses.replace(PLAIN, tie_embeddings=True),
    "llama3_scaling": dataclasses.replace(PLAIN, rope_scaling=RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 16)),
    "linear_scaling": dataclasses.replace(PLAIN, rope_scaling=RopeScalingConfig("linear", 4.0)),
}


def llama_config(config: DecoderConfig) -> LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        rope |= {"rope_type": "linear", "factor": config.rope_scaling.factor}
    elif config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", "factor": config.rope_scaling.factor,
                 "low_freq_factor": config.rope_scaling.low_freq_factor,
                 "high_freq_factor": config.rope_scaling.high_freq_factor,
                 "original_max_position_embeddings": config.rope_scaling.original_max_positions}
    return LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp_width,
        num_hidden_layers=config.depth, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_width, rms_norm_eps=config.norm_eps,
        rope_parameters=rope, tie_word_embeddings=config.tie_embeddings, max_position_embeddings=128,
        attn_implementation="eager",
    )


def causal(rows: int, length: int) -> tuple[jax.Array, IntervalMask]:
    """Positions and the mask of rows that are one causal sequence each."""
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return positions, IntervalMask(jnp.zeros_like(positions), jnp.full_like(positions, length))


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name):
    config = DECODERS[name]
    theirs = randomise(LlamaForCausalLM(llama_config(config)))
    tensors = {n: t for n, t in theirs.state_dict().items() if not (config.tie_embeddings and n == "lm_head.weight")}
    ours = filled(Decoder(config, nnx.Rngs(0)), decoder_rules(config, "model.", "lm_head"), tensors, "decoder/")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    expected = theirs(torch.from_numpy(ids), output_hidden_states=True)
    positions, mask = causal(*ids.shape)
    x = ours.embed(jnp.asarray(ids), jnp.float32)
    assert_close(x, expected.hidden_states[0], "embeddings")
    graph, state = nnx.split(ours.blocks)
    run = jax.jit(lambda block, x: nnx.merge(graph, block)(x, ours.rotation(positions), mask, None, None)[0])
    for layer in range(config.depth):
        x = run(jax.tree.map(lambda leaf, layer=layer: leaf[layer], state), x)
        if layer + 1 < config.depth:  # transformers hands out the last one behind the final norm
            assert_close(x, expected.hidden_states[layer + 1], f"output of layer {layer}")
    assert_close(ours.norm(x), expected.hidden_states[-1], "normed output of the last layer")
    assert_close(ours.logits(x), expected.logits, "logits")
    whole = jax.jit(lambda ids: ours.logits(ours(ours.embed(ids, jnp.float32), positions, mask)[0]))
    assert_close(whole(ids), expected.logits, "logits of the scanned layers")


CONFIG = ModelConfig(
    vision=VisionConfig(image_size=28, patch_size=7, width=32, depth=3, num_heads=2, mlp_width=80),
    projector=ProjectorConfig("mlp2x_gelu"),
    decoder=dataclasses.replace(PLAIN, num_kv_heads=2),
    voco=VocoConfig(2, token_id=97),
)
IMAGE_ID = 98


def llava(config: ModelConfig) -> LlavaForConditionalGeneration:
    vision = config.vision
    return randomise(LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=vision.image_size, patch_size=vision.patch_size, hidden_size=vision.width,
            num_hidden_layers=vision.depth, num_attention_heads=vision.num_heads,
            intermediate_size=vision.mlp_width).to_dict(),
        text_config=llama_config(config.decoder).to_dict(), image_token_index=IMAGE_ID,
        vision_feature_layer=vision.select_layer, vision_feature_select_strategy="default",
        attn_implementation="eager",
    )))


def llava_rules(config: ModelConfig):
    """The names of a LLaVA in memory, which differ from those in its files."""
    return (decoder_rules(config.decoder, "model.language_model.", "lm_head")
            + clip_rules(config.vision, "model.vision_tower.")
            + projector_rules(config.projector, "model.multi_modal_projector.linear_1",
                              "model.multi_modal_projector.linear_2"))


def test_llava_logits_and_gradients():
    """A prompt with an image under the causal view: the same logits, the same loss, and the same gradient of every
    parameter by name."""
    theirs = llava(CONFIG)
    rules = llava_rules(CONFIG)
    ours = filled(VocoLlama(CONFIG, nnx.Rngs(0), jnp.float32), rules, theirs.state_dict(), "")

    rng = np.random.default_rng(0)
    patches, length = CONFIG.vision.num_patches, 30
    images = rng.integers(0, 256, (2, 1, 28, 28, 3)).astype(np.uint8)
    ids = rng.integers(0, 97, (2, length))
    vision = np.full((2, length), -1)
    for row, first in enumerate((1, 4)):  # vision tokens don't start at the same place in the two rows
        ids[row, first : first + patches] = IMAGE_ID
        vision[row, first : first + patches] = np.arange(patches)
    is_target = (rng.random((2, length)) < 0.5) & (vision < 0)
    is_target[:, 0] = False

    pixels = ((images[:, 0] / 255.0 - CLIP_MEAN) / CLIP_STD).astype(np.float32).transpose(0, 3, 1, 2)
    labels = torch.from_numpy(np.where(is_target, ids, -100))
    expected = theirs(input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(pixels), labels=labels)
    expected.loss.backward()

    positions, mask = causal(2, length)
    own_ids = np.where(ids == IMAGE_ID, 1, ids)  # a vision token's own id is never read
    rows = Rows(jnp.asarray(own_ids), positions, mask.start, mask.stop, jnp.asarray(vision), jnp.asarray(images))
    graph, params = nnx.split(ours, nnx.Param)

    @jax.jit
    def loss_and_logits(params):
        model = nnx.merge(graph, params)
        logits_BSV = model.decoder.logits(model(rows)[0])
        log_probs = jax.nn.log_softmax(logits_BSV[:, :-1])
        picked = jnp.take_along_axis(log_probs, jnp.asarray(ids)[:, 1:, None], axis=-1)[..., 0]
        keep = jnp.asarray(is_target[:, 1:])
        return -jnp.sum(picked * keep) / keep.sum(), logits_BSV

    (loss, logits), gradients = jax.value_and_grad(loss_and_logits, has_aux=True)(params)
    assert_close(logits, expected.logits, "logits")
    assert_close(loss, expected.loss, "loss")

    flat = {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradients)}
    theirs_grad = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    mapped = MappedWeights(Table("gradients", tuple(rules)), TorchTensors(theirs_grad), parameter_shapes(CONFIG))
    assert set(flat) == set(mapped.shapes)
    for path in mapped.shapes:
        np.testing.assert_allclose(flat[path], mapped.read(path), rtol=0, atol=1e-4, err_msg=f"gradient of {path}")
    assert np.abs(flat["vision/patch_embedding"]).max() > 1e-3  # the comparison says something at the far end
    assert not flat["vision/final_blocks/mlp_in/kernel"].any()


def test_decoder_under_the_voco_mask():
    """One image and its text: transformers with the method's mask written out as a matrix, against our two vectors."""
    unit, vocos, length = 1 + 9 + 1, 2, 25  # BOS, nine vision tokens and the newline; then VoCo tokens and the text
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    is_text = query >= unit + vocos
    visible = (key <= query) & ~(is_text & (key < unit))
    assert visible[unit + vocos].tolist() == [False] * unit + [True] * (vocos + 1) + [False] * (length - 14)
    config = DECODERS["grouped_query"]
    theirs = randomise(LlamaForCausalLM(llama_config(config)))
    ours = filled(Decoder(config, nnx.Rngs(0)), decoder_rules(config, "model.", "lm_head"), theirs.state_dict(),
                  "decoder/")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
    bias = torch.from_numpy(np.where(visible, 0.0, np.finfo(np.float32).min).astype(np.float32))[None, None]
    expected = theirs(torch.from_numpy(ids), attention_mask=bias, position_ids=torch.arange(length)[None])
    positions = jnp.arange(length)[None]
    stop = jnp.where(positions < unit, unit + vocos, length)
    mask = IntervalMask(jnp.zeros_like(positions), stop)
    logits = jax.jit(lambda ids: ours.logits(ours(ours.embed(ids, jnp.float32), positions, mask)[0]))(ids)
    assert_close(logits, expected.logits, "logits")
    causal_logits = theirs(torch.from_numpy(ids)).logits
    assert (causal_logits - expected.logits)[0, unit + vocos :].abs().max() > 0.1  # the mask makes a difference
