"""Choosing tokens, ending answers, showing them as they come, and compiling nothing twice."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vocojax.config import ConfigError
from vocojax.data.conversation import Turn
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.decoding.decode import COMPILATIONS
from vocojax.inference.decoding.sampling import (
    SamplingConfig,
    SamplingInputs,
    SamplingStatics,
    choose,
    likeliest,
    penalise,
    truncate,
)
from vocojax.inference.decoding.text import AnswerText
from vocojax.inference.prompts import bucket

QUESTIONS = ("what color is the shape?", "is the shape red?", "a picture of", "what?", "red blue " * 4)
DRAWN = SamplingConfig(max_new_tokens=8, temperature=1.5, top_k=12, top_p=0.95, repetition_penalty=1.3)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 0.7), (0.6, 5, 1.0), (1.7, 9, 0.5), (1, 0, 1.0)])
def test_what_may_be_drawn_is_what_transformers_leaves(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 3
    expected = TemperatureLogitsWarper(float(temperature))(None, torch.tensor(logits))
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    expected = TopPLogitsWarper(top_p)(None, expected).numpy()
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    found = truncate(jnp.asarray(logits), SamplingInputs.of([sampling] * 4))
    assert (np.isfinite(found) == np.isfinite(expected)).all()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_penalty_is_transformers():
    logits = np.random.default_rng(1).normal(size=(3, 20)).astype(np.float32)
    logits[2] = -np.abs(logits[2])
    held = np.random.default_rng(2).random((3, 20)) < 0.5
    samplings = [SamplingConfig(repetition_penalty=1.8)] * 3
    inputs, statics = SamplingInputs.of(samplings), SamplingStatics.of(samplings)
    found = penalise(jnp.asarray(logits), jnp.asarray(held), inputs)
    chosen = choose(jnp.asarray(logits), jnp.asarray(held), jnp.int32(0), inputs, statics)
    for row in range(3):
        ids = torch.tensor(np.flatnonzero(held[row])[None])
        expected = RepetitionPenaltyLogitsProcessor(1.8)(ids, torch.tensor(logits[row : row + 1]))
        np.testing.assert_allclose(found[row], expected[0], rtol=1e-6)
        assert int(chosen[row]) == int(expected.argmax())


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]).repeat(4000, 0))
    samplings = [SamplingConfig(temperature=1.0, top_k=2, seed=seed) for seed in range(4000)]
    drawn = choose(logits, jnp.zeros((4000, 0), bool), jnp.int32(0), SamplingInputs.of(samplings),
                   SamplingStatics.of(samplings))
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, [2 / 3, 1 / 3, 0], atol=0.03)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(QUESTIONS), st.lists(st.integers(0, 4), min_size=1, max_size=2),
                          st.integers(0, 2**32 - 1)), min_size=3, max_size=4), st.booleans())
def test_a_batch_gives_each_row_the_tokens_it_would_get_alone(assistant, cache, rows, draws):
    sampling = DRAWN if draws else SamplingConfig(max_new_tokens=8)
    asked, units, seeds = [(Turn("user", q),) for q, _, _ in rows], [u for _, u, _ in rows], [s for _, _, s in rows]
    together = np.asarray(assistant.generate_behind(cache, asked, units, sampling, seeds).ids_BT)
    for row in range(len(rows)):
        one = slice(row, row + 1)
        alone = assistant.generate_behind(cache, asked[one], units[one], sampling, seeds[one])
        assert np.asarray(alone.ids_BT).tolist() == together[one].tolist()


def test_penalised_answers_are_the_same_with_the_image_and_after_its_cache(assistant, images, cache):
    """Tokens of images do not count as held, wherever they stand; without that the two would differ."""
    asked = [(Turn("user", q),) for q in QUESTIONS[:2]]
    sampling = dataclasses.replace(DRAWN, repetition_penalty=5.0)
    single = assistant.generate_whole([[images[1]], [images[2], images[0]]], asked, sampling)
    cached = assistant.generate_behind(cache, asked, [[1], [2, 0]], sampling)
    assert np.asarray(single.ids_BT).tolist() == np.asarray(cached.ids_BT).tolist()
    plain = assistant.generate_behind(cache, asked, [[1], [2, 0]], dataclasses.replace(DRAWN, repetition_penalty=1.0))
    assert np.asarray(plain.ids_BT).tolist() != np.asarray(cached.ids_BT).tolist()


@pytest.mark.parametrize("every", [1, 3, 100])
def test_pieces_put_together_are_the_answer(assistant, cache, every):
    sampling = dataclasses.replace(DRAWN, max_new_tokens=12, stop=("green",))
    about = [[0], [1, 2]]
    pieces = list(assistant.stream(cache, QUESTIONS[:2], about, sampling, [3, 4], every=every))
    whole = assistant.read(cache, QUESTIONS[:2], about, sampling, [3, 4])
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == whole
    assert len(pieces) >= (6 if every == 1 else 2)
    assert any(whole)


def test_a_stop_string_ends_an_answer_and_nothing_more_is_computed(assistant, cache):
    free = dataclasses.replace(DRAWN, max_new_tokens=40, temperature=3.0, repetition_penalty=1.0)
    text = assistant.read(cache, QUESTIONS[:1], [[0]], free, [5])[0]
    word = text.split()[3]
    stopped = dataclasses.replace(free, stop=(word, "never said"))
    assert assistant.read(cache, QUESTIONS[:1], [[0]], stopped, [5])[0] == text[: text.index(word)].strip()
    asked = [(Turn("user", QUESTIONS[0]),)]
    ids = np.asarray(assistant.generate_behind(cache, asked, [[0]], stopped, [5]).ids_BT)[0]
    assert (ids[16:] == assistant.tokenizer.eos_id).all()  # looked at after sixteen tokens


def test_text_that_may_change_is_not_shown(llama_tokenizer):
    text = AnswerText(llama_tokenizer, ("STOP",))
    ids = llama_tokenizer.encode("The bus is é STOP now").ids
    shown = [text.sure(ids[:n]) for n in range(len(ids) + 1)]
    for earlier, later in itertools.pairwise(shown):
        assert later.startswith(earlier)
    assert shown[-1] == text.finish(ids).text == "The bus is é"
    assert not any("\N{REPLACEMENT CHARACTER}" in part or "S" in part[1:] for part in shown)


def test_where_an_answer_ends_does_not_depend_on_how_often_one_looks(words):
    """If stop strings overlap, the one that is complete first counts: a frequent look sees no other."""
    text = AnswerText(words, ("color is the", "is", "the shape"))
    ids = words.encode("what color is the shape").ids
    looks = [text.finish(ids[:n]).text for n in range(1, len(ids) + 1) if text.is_over(ids[:n])]
    assert looks == ["what color"] * 3
    both = AnswerText(words, ("shape", "the shape"))
    assert both.finish(ids).text == "what color is"


def test_seeds_out_of_range_are_named(assistant, cache):
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match=rf"seed must be in \[0, 2\*\*32\), got {seed}"):
            assistant.read(cache, QUESTIONS[:2], seeds=[0, seed])


def test_lengths_in_a_bucket_and_other_values_compile_nothing(assistant, cache):
    """The count of compilations stands still over prompt lengths, numbers of units, batch sizes and temperatures."""
    ask = lambda words, units, rows, **how: assistant.read(
        cache, ["red " * words] * rows, [units] * rows, SamplingConfig(max_new_tokens=5, **how))
    ask(3, [0, 1, 2], 3, temperature=0.7)
    before = dict(COMPILATIONS)
    assert before["place"] > 0 and before["first_token"] > 0 and before["more_tokens"] > 0
    for words in range(1, 20, 3):
        ask(words, [0, 1, 2, 3][: 3 + words % 2], 3 + words % 2, temperature=0.1 + words, top_k=words, top_p=0.5)
    assert dict(COMPILATIONS) == before
    eight = VocoCache.concat([cache.take(slice(0, 3)), cache])
    for units in range(5, 9):  # images in the cache
        assistant.read(eight.take(slice(0, units)), ["red"] * 3, [[0, 1, 2]] * 3, SamplingConfig(max_new_tokens=5,
                                                                                                temperature=0.5))
    assert dict(COMPILATIONS) == before
    ask(40, [0, 1, 2], 3, temperature=0.7)
    assert COMPILATIONS["first_token"] == before["first_token"] + 1


def test_buckets_waste_at_most_a_fifth_of_a_long_row():
    assert [bucket(n) for n in (1, 32, 33, 128, 129, 257, 300, 1025)] == [32, 32, 64, 128, 160, 320, 320, 1280]
    assert all(n <= bucket(n) and (n <= 128 or bucket(n) - n <= bucket(n) / 5) for n in range(1, 5000))
    assert len({bucket(n) for n in range(1, 2049)}) == 20


@pytest.mark.parametrize(("how", "message"), [
    ({"temperature": -1}, "temperature must be >= 0, got -1"), ({"top_k": -2}, "top_k must be >= 0, got -2"),
    ({"top_p": 0}, "top_p must be in"), ({"repetition_penalty": 0.0}, "repetition_penalty must be > 0, got 0.0"),
    ({"stop": ("",)}, "stop must hold no empty string"), ({"max_new_tokens": 0}, "max_new_tokens must be >= 1"),
    ({"top_k": 2**31}, "top_k must be < 2"), ({"max_new_tokens": 2**31}, "max_new_tokens must be <= 1048576"),
    ({"temperature": 1e39}, "temperature must be <="), ({"repetition_penalty": 1e-46}, "repetition_penalty must be in"),
    *(({"seed": seed}, rf"seed must be in \[0, 2\*\*32\), got {seed}") for seed in (-1, 2**32)),
    *(({key: value}, f"{key} must be") for key in ("temperature", "top_p", "repetition_penalty")
      for value in (float("nan"), float("inf"), -float("inf"), True, 10**400)),
])
def test_values_out_of_range_are_named(how, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**how)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-38, 1e-40, 1e-46])
def test_a_temperature_close_to_zero_takes_the_likeliest_token(temperature):
    """Logits divided by it would not be finite."""
    cold = SamplingConfig(temperature=temperature)
    assert not cold.draws and not SamplingStatics.of([cold]).draws
    warm = [cold, SamplingConfig(temperature=1.0, top_k=1)]
    chosen = choose(jnp.array([[0.0, 3, 1], [0, 1, 3]]), None, jnp.int32(0), SamplingInputs.of(warm),
                    SamplingStatics.of(warm))
    assert chosen.tolist() == [1, 2]


def test_of_equal_logits_the_first_token_is_the_likeliest():
    logits_BV = jnp.array([[1, 3, 3, 2], [-jnp.inf, -5, -9, -4], [0, 0, 0, 0], [-jnp.inf] * 4, [jnp.nan] * 4])
    np.testing.assert_array_equal(likeliest(logits_BV), [1, 3, 0, 0, 0])


def test_settings_at_the_ends_of_their_ranges_choose_a_token_that_is_there():
    """Of logits with -inf, as `<voco>` has: no NaN, so never token 0, whose logit is -inf."""
    settings = [{"temperature": 1e-5}, {"temperature": 1e9}, {"top_p": 1e-46}, {"repetition_penalty": 1e9},
                {"repetition_penalty": 1e-9}, {"top_k": 2**31 - 1}]
    ends = [SamplingConfig(**{"temperature": 1, **own}) for own in settings]
    logits_BV = jnp.tile(jnp.array([-jnp.inf, 50.0, -50, 3]), (len(ends), 1))
    held_BV = jnp.ones(logits_BV.shape, bool)
    chosen = choose(logits_BV, held_BV, jnp.int32(3), SamplingInputs.of(ends), SamplingStatics.of(ends)).tolist()
    assert 0 not in chosen and chosen[0] == chosen[2] == 1
