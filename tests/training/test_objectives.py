import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vocojax.config import DecoderConfig
from vocojax.layout import IGNORE
from vocojax.models.llama import Decoder
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
    monkeypatch.setattr(objectives, "CHUNK", chunk)
    hidden, index, ids = batch()
    guide = Teacher(decoders[1], 1.5 * hidden, 2.0)
    got = target_sums(decoders[0], hidden, index, ids, guide)
    expected = brute_force(decoders[0], hidden, index, ids, guide, 2.0)
    assert int(got.num_targets) == expected[3] == 9 and int(got.correct) == expected[2]
    np.testing.assert_allclose(got.cross_entropy, expected[0], rtol=1e-5)
    np.testing.assert_allclose(got.kl, expected[1], rtol=1e-4)


def test_chunks_change_no_gradient(decoders, monkeypatch):
    hidden, index, ids = batch()
    loss = lambda h: target_sums(decoders[0], h, index, ids).cross_entropy
    whole = jax.grad(loss)(hidden)
    monkeypatch.setattr(objectives, "CHUNK", 12)
    np.testing.assert_allclose(jax.grad(loss)(hidden), whole, atol=1e-6)


def test_kl_to_itself_is_zero_and_the_teacher_gets_no_gradient(decoders):
    hidden, index, ids = batch()
    kl = lambda student, guide: target_sums(decoders[0], student, index, ids, Teacher(decoders[0], guide, 1.0)).kl
    assert abs(float(kl(hidden, hidden))) < 1e-5
    assert float(jnp.abs(jax.grad(kl, argnums=1)(hidden, hidden + 1)).max()) == 0
    assert float(jnp.abs(jax.grad(kl, argnums=0)(hidden, hidden + 1)).max()) > 0


def test_logits_exist_only_at_targets(decoders):
    """No array of the compiled program has a row of the vocabulary for every token."""
    hidden, index, ids = jnp.zeros((2, 500, 8)), jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3), jnp.int32)
    text = jax.jit(lambda h: target_sums(decoders[0], h, index, ids).cross_entropy).lower(hidden).as_text()
    assert "500x11x" not in text and "1000x11x" not in text and "2x3x11x" in text
