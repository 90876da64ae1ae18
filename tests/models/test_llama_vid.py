"""LLaMA-VID's compressor against torch, and its way from a conversation's question to the model's answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from tests.helpers.parity import assert_close, fill_qformer, randomise
from vocojax.config import CompressorConfig, DecoderConfig, ModelConfig, VisionConfig, VocoConfig
from vocojax.data.conversation import Turn, template
from vocojax.errors import InputError
from vocojax.inference.assistant import Assistant
from vocojax.inference.many import answer_many
from vocojax.inference.requests import Request
from vocojax.layout import LayoutError, Span, lay_out_sample, unit_shape
from vocojax.models.compressors import LlamaVid
from vocojax.models.voco import VocoLlama

COMPRESSOR = CompressorConfig("llama_vid", num_tokens=5, num_queries=3, question_tokens=6, depth=4, width=32,
                              num_heads=2, mlp_width=80)


def put(linear, theirs: torch.nn.Linear) -> None:
    linear.kernel[...] = theirs.weight.detach().numpy().T
    linear.bias[...] = theirs.bias.detach().numpy()


def test_context_and_content_tokens():
    """Against transformers' Q-Former with text, and the paper's equations in torch."""
    vision, width, decoder = 24, 32, 40
    theirs = randomise(InstructBlipQFormerModel(InstructBlipQFormerConfig(
        hidden_size=width, num_hidden_layers=4, num_attention_heads=2, intermediate_size=80, vocab_size=50,
        cross_attention_frequency=2, encoder_hidden_size=vision, max_position_embeddings=6)))
    config = ModelConfig(
        VisionConfig(image_size=28, patch_size=7, width=vision, depth=1, num_heads=2, mlp_width=48, select_layer=-1),
        decoder=DecoderConfig(vocab_size=50, width=decoder, depth=1, num_heads=2, num_kv_heads=2, head_width=20,
                              mlp_width=64),
        voco=VocoConfig(token_id=49), compressor=COMPRESSOR)
    ours = LlamaVid(config, nnx.Rngs(0))
    fill_qformer(ours.qformer, theirs.state_dict(), 4, 2)
    ours.word_embedding[...] = theirs.embeddings.word_embeddings.weight.detach().numpy()
    ours.position_embedding[...] = theirs.embeddings.position_embeddings.weight.detach().numpy()
    query, key, value = (randomise(torch.nn.Linear(*sizes), seed) for seed, sizes in enumerate(
        [(width, vision), (vision, vision), (vision, decoder)]))
    for linear, torch_linear in ((ours.query, query), (ours.key, key), (ours.value, value)):
        put(linear, torch_linear)

    hidden = np.random.default_rng(0).standard_normal((3, 17, vision)).astype(np.float32)
    questions = np.array([[7, 8, 9, 10, 11, 12], [3, 4, -1, -1, -1, -1], [-1] * 6], np.int32)
    features = torch.from_numpy(hidden)
    queries = torch.from_numpy(np.array(ours.qformer.queries[...])).expand(3, -1, -1)
    is_token = torch.from_numpy(questions >= 0)
    made = theirs(torch.from_numpy(questions).clamp(min=0).long(), query_embeds=queries,
                  attention_mask=torch.cat([torch.ones(3, 3, dtype=bool), is_token], 1).long(),
                  encoder_hidden_states=torch.nn.functional.layer_norm(features, (vision,), eps=1e-5))
    asked, patches = query(made.last_hidden_state[:, :3]), features[:, 1:]
    weights = (asked @ key(patches).transpose(1, 2) / vision**0.5).softmax(-1)
    context = value((weights @ patches).mean(1, keepdim=True))
    content = torch.nn.functional.avg_pool2d(patches.transpose(1, 2).reshape(3, vision, 4, 4), 2)

    context_U1E, content_UNE = jax.jit(ours)(hidden, questions)
    assert_close(context_U1E, context, "context tokens")
    assert_close(content_UNE, content.flatten(2).transpose(1, 2), "content tokens")


@pytest.fixture(scope="module")
def assistant(tiny_config, words):
    compressor = dataclasses.replace(COMPRESSOR, num_tokens=2, depth=1, cross_attention_every=1)
    config = dataclasses.replace(tiny_config, compressor=compressor)
    model = VocoLlama(config, nnx.Rngs(0), jnp.float32)
    return Assistant(model, words, template("short"), "causal")


def test_a_question_reaches_the_compressor(assistant, words):
    """It is the first question of the conversation, whose last tokens count, without markers and system turn."""
    said = (Turn("system", "red"), Turn("user", "<image>\nis it red"), Turn("assistant", "no"), Turn("user", "why"))
    layout = assistant.lay_out(said, 1)
    assert layout.question == tuple(words.encode("is it red").ids)
    longer = assistant.lay_out((Turn("user", "is it red red is it is"),), 1)
    assert longer.question == tuple(words.encode("it red red is it is").ids)
    assert assistant.lay_out((Turn("user", "<image>"),), 1).question == ()
    with pytest.raises(LayoutError, match=r"compressed for one question: set data\.threads_per_sample=1"):
        lay_out_sample("r", 1, [[Span("a")], [Span("b")]], words, unit_shape(assistant.model.config), 100)


def test_the_same_image_has_other_tokens_for_another_question(assistant):
    """And no cache, because one would serve a single question."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    asked = [np.full((1, 6), -1, np.int32) for _ in range(2)]
    asked[0][0, :3], asked[1][0, :2] = (1, 2, 3), (4, 5)
    encode = jax.jit(assistant.model.encode_images)
    one, other = (np.asarray(encode(image[None], 0, question))[0] for question in asked)
    assert np.abs(one[0] - other[0]).max() > 1e-4 and (one[1] == other[1]).all()  # context and content
    with pytest.raises(InputError, match="'llama_vid' compresses an image for one question, so no cache serves"):
        assistant.compress(image)
    requests = [Request(text, (image,)) for text in ("is it red", "why", "is it red")]
    answers = list(answer_many(assistant, requests, with_logits=True, batch_size=2, progress=None))
    assert not any(answer.error for answer in answers)
    np.testing.assert_allclose(answers[0].first_logits_V, answers[2].first_logits_V, atol=1e-5)
