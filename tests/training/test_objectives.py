import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from vocojax.config import DecoderConfig
from vocojax.layout import IGNORE
from vocojax.models import gathering
from vocojax.models.gathering import Parts, cut, gathered
from vocojax.models.llama import Decoder
from vocojax.models.parameters import abstract
from vocojax.models.voco import VocoLlama
from vocojax.training import objectives
from vocojax.training.objectives import Teacher, target_sums


@pytest.fixture(scope="module")
def decoders():
    config = DecoderConfig(vocab_size=11, width=8, depth=1, num_heads=2, num_kv_heads=2, head_width=4, mlp_width=8)
    return Decoder(config, nnx.Rngs(0)), Decoder(config, nnx.Rngs(1))


def batch(rows=3, length=10, targets=6):
    random = np.random.default_rng(0)
    hidden = jnp.array(random.normal(size=(rows, length, 8)), jnp.float32)
    index = random.integers(0, length, (rows, targets)).astype(np.int32)
    ids = random.integers(0, 11, (rows, targets)).astype(np.int32)
    ids[0, 3:], ids[2, :] = IGNORE, IGNORE
    return hidden, jnp.array(index), jnp.array(ids)


def brute_force(decoder, hidden, index, ids, teacher=None, temperature=1.0):
    """Sums target by target, in float64 with numpy."""
    softmax = lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    cross_entropy = kl = correct = count = 0
    for row in range(ids.shape[0]):
        for slot in range(ids.shape[1]):
            target = int(ids[row, slot])
            if target == IGNORE:
                continue
            logits = np.asarray(decoder.logits(hidden[row, index[row, slot]]), np.float64)
            cross_entropy -= np.log(softmax(logits)[target])
            correct += logits.argmax() == target
            count += 1
            if teacher is not None:
                guide = np.asarray(teacher.decoder.logits(teacher.hidden_BSE[row, index[row, slot]]), np.float64)
                p, q = softmax(guide / temperature), softmax(logits / temperature)
                kl += temperature**2 * (p * np.log(p / q)).sum()
    return cross_entropy, kl, correct, count


@pytest.mark.parametrize("chunk", [128, 12])  # in one piece, and in chunks that don't divide the targets
def test_sums_are_the_definition(decoders, monkeypatch, chunk):
    monkeypatch.setattr(objectives, "CPU_CHUNK", chunk)
    hidden, index, ids = batch()
    guide = Teacher(decoders[1], 1.5 * hidden, 2.0, 0.5)
    got = target_sums(decoders[0], hidden, index, ids, guide)
    expected = brute_force(decoders[0], hidden, index, ids, guide, 2.0)
    assert int(got.num_targets) == expected[3] == 9 and int(got.correct) == expected[2]
    np.testing.assert_allclose(got.cross_entropy, expected[0], rtol=1e-5)
    np.testing.assert_allclose(got.kl, expected[1], rtol=1e-4)


def plain_loss(decoder, hidden, index, ids, teacher):
    """The loss of all targets at once, for automatic differentiation."""
    at_targets = lambda states: jnp.take_along_axis(states, index[..., None], axis=1)
    logits = decoder.logits(at_targets(hidden))
    log_p = jax.nn.log_softmax(logits)
    cross_entropy = -jnp.take_along_axis(log_p, jnp.maximum(ids, 0)[..., None], axis=-1)[..., 0]
    guide = jax.nn.softmax(teacher.decoder.logits(at_targets(teacher.hidden_BSE)) / teacher.temperature)
    cooled = jax.nn.log_softmax(logits / teacher.temperature)
    kl = teacher.temperature**2 * (guide * (jnp.log(guide) - cooled)).sum(-1)
    return jnp.where(ids != IGNORE, cross_entropy + teacher.weight * kl, 0.0).sum()


@pytest.mark.parametrize("chunk", [128, 12])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_automatic_differentiation(decoders, monkeypatch, chunk, tied):
    monkeypatch.setattr(objectives, "CPU_CHUNK", chunk)
    config = dataclasses.replace(decoders[0].config, tie_embeddings=tied, vocab_size=13, vocab_padding=2)
    graphdef, state = nnx.split(Decoder(config, nnx.Rngs(2)))
    hidden, index, ids = batch()
    guide = Teacher(Decoder(config, nnx.Rngs(3)), 1.5 * hidden, 2.0, 0.5)
    grads = [
        jax.grad(lambda state, hidden, loss=loss: 3 * loss(nnx.merge(graphdef, state), hidden), argnums=(0, 1))(
            state, hidden)
        for loss in (lambda decoder, hidden: target_sums(decoder, hidden, index, ids, guide).loss,
                     lambda decoder, hidden: plain_loss(decoder, hidden, index, ids, guide))
    ]
    assert float(jnp.abs(grads[1][0]["norm"]["scale"][...]).max()) > 0.1
    jax.tree.map(lambda got, expected: np.testing.assert_allclose(got, expected, atol=2e-5), *grads)


@pytest.mark.parametrize("taught", [False, True])
def test_slots_after_the_last_target_change_no_bit_and_are_not_read(decoders, monkeypatch, taught):
    """Chunks of 4 slots of 3 rows: 6 slots are two chunks; with 34 empty slots more there are eight empty chunks.

    The slots of the empty chunks point to a state that is NaN, which would spoil every gradient in the head.
    """
    monkeypatch.setattr(objectives, "CPU_CHUNK", 12)
    hidden, index, ids = batch()
    more_index = jnp.pad(jnp.pad(index, ((0, 0), (0, 2))), ((0, 0), (0, 32)), constant_values=10)
    more_ids = jnp.pad(ids, ((0, 0), (0, 34)), constant_values=IGNORE)
    hidden = jnp.concatenate([hidden, jnp.full((3, 1, 8), jnp.nan)], axis=1)

    def loss(decoder, hidden, index, ids):
        guide = Teacher(decoders[1], 1.5 * hidden, 2.0, 0.5) if taught else None
        sums = target_sums(decoder, hidden, index, ids, guide)
        return sums.loss, sums

    few, many = (jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(decoders[0], hidden, *targets)
                 for targets in ((index, ids), (more_index, more_ids)))
    for got, expected in zip(jax.tree.leaves(many), jax.tree.leaves(few), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert int(few[0][1].num_targets) == 9 and float(jnp.abs(few[1][1]).max()) > 0.1


def test_a_target_after_empty_chunks_counts(decoders, monkeypatch):
    monkeypatch.setattr(objectives, "CPU_CHUNK", 3)
    hidden, index, ids = batch()
    last_only = jnp.full_like(ids, IGNORE).at[1, -1].set(ids[1, -1])
    got = target_sums(decoders[0], hidden, index, last_only)
    assert int(got.num_targets) == 1
    np.testing.assert_allclose(got.loss, brute_force(decoders[0], hidden, index, last_only)[0], rtol=1e-5)


def test_a_batch_without_a_target_sums_to_zero(decoders, monkeypatch):
    monkeypatch.setattr(objectives, "CPU_CHUNK", 3)
    hidden, index, ids = batch()
    loss = lambda hidden: target_sums(decoders[0], hidden, index, jnp.full_like(ids, IGNORE)).loss
    assert jax.value_and_grad(loss)(hidden)[0] == 0 and not jax.grad(loss)(hidden).any()


def test_logits_are_made_once_per_step(decoders):
    """Of the three products with the head one makes logits: they are not computed again on the way back."""
    hidden, index, ids = batch()
    loss = lambda h, k: target_sums(with_head(decoders[0], k), h, index, ids).loss
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, decoders[0].head.kernel[...]))
    assert text.count("dot_general") == 3


def test_a_frozen_head_costs_no_gradient(decoders):
    """Its gradient is written down with the loss; the compiler leaves it out where nobody asks for it."""
    hidden, index, ids = batch()
    loss = lambda h, k: target_sums(with_head(decoders[0], k), h, index, ids).loss
    products = lambda *trained: jax.jit(jax.grad(loss, argnums=trained)).lower(
        hidden, decoders[0].head.kernel[...]).compile().as_text().count(" dot(")
    assert (products(0), products(0, 1)) == (2, 3)


def with_head(decoder, kernel):
    graphdef, state = nnx.split(decoder)
    state["head"]["kernel"] = state["head"]["kernel"].replace(kernel)
    return nnx.merge(graphdef, state)


@pytest.mark.parametrize("in_parts", [False, True])
def test_gradients_of_bf16_models_are_summed_in_fp32(in_parts, monkeypatch):
    """1,000 equal targets, each in a chunk of its own, of 1,000 equal tokens: a sum in bf16 would stop at 256 of them.

    With both weights zero every token of 4 is as likely: the target's column of the head moves by -(1 - 1/4) times the
    normed state, the others' by 1/4 of it, off by no more than the one rounding to bf16 before the sum over devices.
    """
    monkeypatch.setattr(objectives, "CPU_CHUNK", 1)
    config = DecoderConfig(vocab_size=4, width=8, depth=1, num_heads=2, num_kv_heads=2, head_width=4, mlp_width=8)
    decoder = Decoder(config, nnx.Rngs(0))
    decoder.head.kernel[...] *= 0
    parts = {"head/kernel": Parts("fsdp", -1, (1,)), "embedding": Parts("fsdp", -2, (1,))} if in_parts else {}
    ids = jnp.full((1, 1000), 2)

    def loss(state):
        model = gathered(nnx.merge(graphdef, state), stacked=False)
        hidden = jnp.ones((1, 1000, 8), jnp.bfloat16)
        heads = target_sums(model, hidden, jnp.arange(1000)[None], ids).loss
        return heads + model.embed(ids, jnp.bfloat16).astype(jnp.float32).sum()

    graphdef, state = nnx.split(cut(decoder, parts, jnp.bfloat16))
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    spread = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(),
                           check_vma=False)
    grads = jax.jit(spread)(state)
    head, embedding = grads["head"]["kernel"][...], grads["embedding"][...]
    assert head.dtype == embedding.dtype == jnp.float32
    np.testing.assert_allclose(head, np.full((8, 4), 1000) * [0.25, 0.25, -0.75, 0.25], rtol=2**-8)
    np.testing.assert_array_equal(embedding[:, 0], [0, 0, 1000, 0])


def test_a_cut_model_is_a_copy(tiny_config):
    model = abstract(lambda: VocoLlama(tiny_config, nnx.Rngs(0)))
    part = cut(model, {"decoder/embedding": Parts("fsdp", -2, (2,))}, jnp.bfloat16)
    # The program's own model also runs outside of `shard_map`.
    assert gathering.in_parts(part) and not gathering.in_parts(model)


def test_kl_to_itself_is_zero_and_the_teacher_gets_no_gradient(decoders):
    hidden, index, ids = batch()
    guided = lambda student, guide: target_sums(
        decoders[0], student, index, ids, Teacher(decoders[0], guide, 1.0, weight=1.0))
    assert abs(float(guided(hidden, hidden).kl)) < 1e-5
    of_student, of_guide = jax.grad(lambda *states: guided(*states).loss, argnums=(0, 1))(hidden, hidden + 1)
    assert float(jnp.abs(of_guide).max()) == 0
    alone = jax.grad(lambda student: target_sums(decoders[0], student, index, ids).loss)(hidden)
    assert float(jnp.abs(of_student - alone).max()) > 0.01


def test_logits_exist_only_at_targets(decoders):
    """No array of the compiled program has a row of the vocabulary for every token."""
    hidden, index, ids = jnp.zeros((2, 500, 8)), jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3), jnp.int32)
    text = jax.jit(lambda h: target_sums(decoders[0], h, index, ids).loss).lower(hidden).as_text()
    assert "500x11x" not in text and "1000x11x" not in text and "6x11x" in text
