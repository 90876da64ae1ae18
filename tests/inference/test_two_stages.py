"""Compress once and read: the same answers as a single pass, for one image or several, in any order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from vocojax.data.conversation import Turn
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.cache import CacheError
from vocojax.inference.compress import compress, compress_keeping, rows_at_once, run_units
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.prompts import lay_out_prompt, whole_rows
from vocojax.layout import LayoutError, lay_out_unit, unit_shape
from vocojax.models.parameters import parameters_of, with_parameters
from vocojax.models.voco import VocoLlama
from vocojax.parallel.mesh import AXES

GREEDY = SamplingConfig(max_new_tokens=6)
QUESTIONS = ("what color is the shape?", "is the shape red?", "a picture of", "what?")


def ask(text):
    return (Turn("user", text),)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(QUESTIONS), st.lists(st.integers(0, 4), min_size=1, max_size=3)),
                min_size=3, max_size=3))
def test_answers_from_the_cache_are_those_of_a_single_pass(assistant, images, cache, drawn):
    """Batches of different questions about different numbers of units, in any order, repeated units included."""
    asked, about = [ask(q) for q, _ in drawn], [units for _, units in drawn]
    single = assistant.generate_whole([[images[u] for u in units] for units in about], asked, GREEDY)
    cached = assistant.generate_behind(cache, asked, about, GREEDY)
    finite = np.isfinite(single.logits_BV)
    np.testing.assert_allclose(np.asarray(cached.logits_BV)[finite], np.asarray(single.logits_BV)[finite], atol=1e-4)
    assert (np.asarray(single.ids_BT) == np.asarray(cached.ids_BT)).all()


@pytest.mark.parametrize("positions", ["compact", "sequential"])
def test_text_that_reads_fewer_tokens_is_trained_as_it_is_read(assistant, images, positions):
    """A batch of texts that see one or both of the two VoCo tokens of each unit: as after a cache of so many."""
    config = assistant.model.config
    other = dataclasses.replace(config, voco=dataclasses.replace(config.voco, positions=positions))
    model = with_parameters(VocoLlama(other, nnx.Rngs(0), jnp.float32), parameters_of(assistant.model))
    reader = Assistant(model, assistant.tokenizer, assistant.template)
    cache, about, unread = reader.compress(images), [[0], [3, 1], [1, 2, 4]], [1, 0, 1]
    samples = [dataclasses.replace(reader.lay_out(ask(question), len(units)), unread=hidden)
               for question, units, hidden in zip(QUESTIONS[:3], about, unread, strict=True)]
    *_, single = reader.runner.run_whole(samples, [[images[u] for u in units] for units in about], [GREEDY] * 3)
    for row, hidden in enumerate(unread):
        kept = cache.truncate(2 - hidden)
        behind = reader.generate_behind(kept, [ask(q) for q in QUESTIONS[:3]], about, GREEDY)
        finite = np.isfinite(single.logits_BV[row])
        np.testing.assert_allclose(np.asarray(behind.logits_BV)[row, finite], np.asarray(single.logits_BV)[row, finite],
                                   atol=1e-4)
        assert np.asarray(single.ids_BT)[row].tolist() == np.asarray(behind.ids_BT)[row].tolist()
    with pytest.raises(CacheError, match="a cache of 2 VoCo tokens per unit cannot be truncated to 3"):
        reader.read(cache, [QUESTIONS[0]], [[0]], vocos=3)


def test_full_caching_agrees_with_the_causal_single_pass(assistant, images):
    """Keeping the whole unit is the usual caching of an image: the upper bound's second stage."""
    causal = Assistant(assistant.model, assistant.tokenizer, assistant.template, "causal")
    unit = len(lay_out_unit("unit", assistant.tokenizer, unit_shape(assistant.model.config)))
    everything = compress_keeping(assistant.model, assistant.tokenizer, images, unit)
    asked = [ask(q) for q in QUESTIONS]
    single = causal.generate_whole([[images[i]] for i in range(4)], asked, GREEDY)
    cached = causal.generate_behind(everything, asked, [[i] for i in range(4)], GREEDY)
    assert (np.asarray(single.ids_BT) == np.asarray(cached.ids_BT)).all()
    np.testing.assert_allclose(cached.logits_BV, single.logits_BV, atol=1e-4)


def test_many_cached_images_fit_where_their_vision_tokens_would_not(assistant, images, cache):
    """A prompt about five images takes 5 x 8 tokens with their units, and 5 x 2 + text after a cache."""
    short = Assistant(assistant.model, assistant.tokenizer, assistant.template, max_length=30)
    with pytest.raises(LayoutError):
        short.generate_whole([images], [ask("what?")], GREEDY)
    about = [[0, 1, 2, 3, 4]]
    assert short.read(cache, ["what?"], about, GREEDY) == assistant.read(cache, ["what?"], about, GREEDY)


def test_sequential_positions_are_read_by_their_own_model_alone(assistant, images, cache):
    """Answers from a cache are those of a single pass, and neither scheme reads the other's caches."""
    config = assistant.model.config
    numbered = dataclasses.replace(config, voco=dataclasses.replace(config.voco, positions="sequential"))
    model = with_parameters(VocoLlama(numbered, nnx.Rngs(0), jnp.float32), parameters_of(assistant.model))
    other = Assistant(model, assistant.tokenizer, assistant.template)
    asked, about = [ask(q) for q in QUESTIONS[:3]], [[0], [3, 1], [1, 2, 4]]
    whole = [[images[unit] for unit in units] for units in about]
    single, made = other.generate_whole(whole, asked, GREEDY), other.compress(images)
    np.testing.assert_allclose(other.generate_behind(made, asked, about, GREEDY).logits_BV, single.logits_BV, atol=1e-4)
    compact = assistant.generate_whole(whole, asked, GREEDY)
    difference = np.abs(np.where(np.isfinite(single.logits_BV), single.logits_BV - compact.logits_BV, 0)).max(-1)
    assert difference[0] < 1e-5 and (difference[1:] > 1e-5).all(), "they differ from the second unit on"
    for reader, of in ((assistant, made), (other, cache)):
        with pytest.raises(CacheError, match=r"voco\.positions is '(compact|sequential)' there"):
            reader.generate_behind(of, asked[:1], [[0]], GREEDY)


def test_batches_of_compression_are_the_whole(assistant, images):
    whole = compress(assistant.model, assistant.tokenizer, images)
    in_batches = compress(assistant.model, assistant.tokenizer, images, batch_size=2)
    np.testing.assert_allclose(in_batches.k_LUNGD, whole.k_LUNGD, atol=1e-5)


def test_a_batch_of_compression_is_shared_evenly_by_the_devices():
    assert [rows_at_once(count, 64) for count in (1, 5, 64, 1000)] == [1, 8, 64, 64]
    assert (rows_at_once(1000, 100), rows_at_once(200, 256)) == (100, 256)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 3, 2, 1), AXES)):
        assert [rows_at_once(count, 64) for count in (1, 7, 50, 1000)] == [6, 12, 60, 60]
        assert rows_at_once(1000, 4) == 6


def test_the_order_of_units_matters_to_the_text(assistant, cache):
    asked = [ask(QUESTIONS[0])] * 2
    logits = np.asarray(assistant.generate_behind(cache, asked, [[0, 1], [1, 0]], GREEDY).logits_BV)
    finite = np.isfinite(logits[0])
    assert np.abs(logits[0, finite] - logits[1, finite]).max() > 1e-4


def test_rows_answer_as_they_would_alone(assistant, cache):
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.0)
    about = [[0], [1, 2, 3], [4, 0]]
    together = assistant.read(cache, QUESTIONS[:3], about, sampling, seeds=[5, 6, 7])
    for question, units, seed, answer in zip(QUESTIONS[:3], about, [5, 6, 7], together, strict=True):
        assert assistant.read(cache, [question], [units], sampling, [seed]) == [answer]


def test_cached_generation_is_greedy_decoding_by_brute_force(assistant, images):
    """Token by token, re-running the whole prompt with the answer so far appended."""
    model, tokenizer = assistant.model, assistant.tokenizer
    ids = np.asarray(assistant.generate_whole([[images[0]]], [ask(QUESTIONS[0])], GREEDY).ids_BT)[0].tolist()
    sample = lay_out_prompt("q", 1, ask(QUESTIONS[0]), assistant.template, tokenizer, unit_shape(model.config), 100)
    answer = []
    for _ in range(GREEDY.max_new_tokens):
        length = len(sample) + len(answer)
        rows = whole_rows([sample], [[images[0]]], model.config, "voco", length)
        view = sample.view("voco")
        rows.ids_BS[0, len(sample) :] = answer
        rows.positions_BS[0, len(sample) :] = view.positions[-1] + 1 + np.arange(len(answer))
        rows.start_BS[0, len(sample) :] = 0
        rows.stop_BK[0] = np.where(rows.stop_BK[0] >= len(sample), length, rows.stop_BK[0])
        hidden = model(jax.tree.map(jnp.asarray, rows))[0][:, -1]
        logits = np.array(model.decoder.logits(hidden)[0])
        logits[tokenizer.voco_id] = -np.inf
        answer.append(int(logits.argmax()))
        if answer[-1] == tokenizer.eos_id:
            break
    assert ids[: len(answer)] == answer


def test_sampling_follows_seed_temperature_and_top_p(assistant, cache):
    draw = lambda seed, **how: assistant.generate_behind(
        cache, [ask(QUESTIONS[0])] * 4, [[0]] * 4, SamplingConfig(max_new_tokens=5, **how), range(seed, seed + 4)
    ).ids_BT.tolist()
    assert draw(0, temperature=1.0) == draw(0, temperature=1.0)
    assert draw(0, temperature=1.0) != draw(100, temperature=1.0)
    assert draw(0, temperature=1.0, top_p=1e-6) == draw(0) == draw(0, temperature=1e-4)


def test_answers_never_hold_voco_tokens(assistant, cache):
    sampling = SamplingConfig(max_new_tokens=30, temperature=20.0)
    ids = assistant.generate_behind(cache, [ask(q) for q in QUESTIONS], [[0]] * 4, sampling).ids_BT
    assert assistant.tokenizer.voco_id not in np.asarray(ids)


def test_clear_errors(assistant, images, cache, tmp_path):
    with pytest.raises(LayoutError, match=r"has \d+ tokens, more than the \d+ there is room for"):
        short = Assistant(assistant.model, assistant.tokenizer, assistant.template, max_length=20)
        short.read(cache, ["is " * 30], [[0]])
    with pytest.raises(ValueError, match=r"images must be one or more uint8 \[32, 32, 3\] arrays, got none"):
        compress(assistant.model, assistant.tokenizer, [])
    with pytest.raises(ValueError, match=r"got \['float32\[32, 32, 3\]'\]"):
        compress(assistant.model, assistant.tokenizer, [images[0].astype(np.float32)])
    for units in ([[5]], [[-1]], [[]], []):
        with pytest.raises(ValueError, match="questions must be about units 0 to 4, at least one each"):
            assistant.read(cache, ["what?"][: len(units)], units)
    causal = Assistant(assistant.model, assistant.tokenizer, assistant.template, "causal")
    with pytest.raises(ValueError, match="a causal model reads whole units"):
        causal.read(cache, ["what?"], [[0]])
    with pytest.raises(ValueError, match="cannot be read"):
        assistant.compress([tmp_path / "missing.png"])
    (tmp_path / "broken.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be decoded"):
        assistant.compress([tmp_path / "broken.png"])


def test_few_programs_serve_all_numbers_of_images(assistant, images):
    """One for each power of two: a batch is filled up, and what fills it changes nothing."""
    run_units.clear_cache()
    caches = {count: assistant.compress([images[i % 5] for i in range(count)]) for count in range(1, 10)}
    assert run_units._cache_size() == len((1, 2, 4, 8, 16))
    for count, cache in caches.items():
        assert cache.num_units == count
        np.testing.assert_allclose(cache.k_LUNGD[:, :1], caches[1].k_LUNGD, atol=1e-5)
