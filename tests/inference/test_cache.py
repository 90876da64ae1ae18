"""Caches: cut, joined, saved and loaded they give the answers of the model they are of, and no other."""

import copy
import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save as to_safetensors

from vocojax.data.conversation import Turn, template
from vocojax.data.tokenizer import word_tokenizer
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches import files
from vocojax.inference.caches.cache import CacheError, VocoCache
from vocojax.inference.caches.files import (
    FORMAT,
    DamagedCache,
    dequantise,
    from_bytes,
    load,
    quantise,
    save,
    to_bytes,
)
from vocojax.inference.caches.fingerprint import Fingerprint, fingerprint, image_digest
from vocojax.inference.caches.store import Store
from vocojax.inference.compress import compress_keeping
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.models.parameters import parameters_of, with_parameters
from vocojax.models.voco import VocoLlama

GREEDY = SamplingConfig(max_new_tokens=6)
ASKED = [(Turn("user", q),) for q in ("what color is the shape?", "is the shape red?")]


def logits(assistant, cache, units=((0,), (3, 1))):
    found = np.asarray(assistant.generate_behind(cache, ASKED, units, GREEDY).logits_BV)
    return found[:, np.isfinite(found[0])]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_saved_and_loaded_it_is_the_same_to_the_bit(cache, tmp_path, dtype):
    cache = dataclasses.replace(cache, k_LUNGD=cache.k_LUNGD.astype(dtype), v_LUNGD=cache.v_LUNGD.astype(dtype))
    save(cache, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors", cache.fingerprint)
    assert again.k_LUNGD.dtype == dtype
    assert np.array_equal(again.k_LUNGD, cache.k_LUNGD) and np.array_equal(again.v_LUNGD, cache.v_LUNGD)
    kept = lambda c: (c.first_position, c.image_digests, c.fingerprint)
    assert kept(again) == kept(cache)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_joined_in_any_order_it_gives_the_same_answers(assistant, images, cache):
    """Units compressed one by one and joined back to front, asked about by their new places."""
    joined = VocoCache.concat([assistant.compress([images[i]]) for i in (4, 3, 2, 1, 0)])
    assert joined.image_digests == cache.image_digests[::-1] and joined.num_units == 5
    np.testing.assert_allclose(logits(assistant, joined, [[4], [1, 3]]), logits(assistant, cache), atol=1e-4)


def test_truncated_it_is_the_cache_of_a_model_with_fewer_tokens(assistant, images, cache):
    """The same weights with one VoCo token instead of two: same cache, same logits as its single pass."""
    model = assistant.model
    one = dataclasses.replace(model.config, voco=dataclasses.replace(model.config.voco, num_vocos=1))
    fewer = assistant.with_model(with_parameters(VocoLlama(one, nnx.Rngs(1), jnp.float32), parameters_of(model)))
    short = cache.truncate(1)
    assert short.k_LUNGD.shape[2] == 1 and fewer.fingerprint == assistant.fingerprint == short.fingerprint
    np.testing.assert_allclose(short.k_LUNGD, fewer.compress(images).k_LUNGD, atol=1e-5)
    single = np.asarray(fewer.generate_whole([[images[0]], [images[3], images[1]]], ASKED, GREEDY).logits_BV)
    single = single[:, np.isfinite(single[0])]
    np.testing.assert_allclose(logits(assistant, short), single, atol=1e-4)
    np.testing.assert_allclose(logits(fewer, short), single, atol=1e-4)


def test_int8_rounds_to_a_254th_of_each_vectors_largest_entry(assistant, cache, tmp_path):
    values, scale = quantise(np.array([[[1.0, -2.54, 0.02, 0.0]], [[0, 0, 0, 0]]], np.float32))
    assert values.tolist() == [[[50, -127, 1, 0]], [[0, 0, 0, 0]]] and scale.shape == (2, 1)
    np.testing.assert_allclose(dequantise(values, scale, np.dtype(np.float32))[0, 0], [1.0, -2.54, 0.02, 0], atol=1e-6)
    save(cache, tmp_path / "small.safetensors", "int8")
    small = load(tmp_path / "small.safetensors", cache.fingerprint)
    for exact, rounded in ((cache.k_LUNGD, small.k_LUNGD), (cache.v_LUNGD, small.v_LUNGD)):
        largest = np.abs(exact).max(-1, keepdims=True)
        assert (np.abs(exact - rounded) <= largest / 253).all() and not np.array_equal(exact, rounded)
    assert np.abs(logits(assistant, small) - logits(assistant, cache)).max() < 0.02
    body = lambda content: len(content) - int.from_bytes(content[:8], "little")
    per_vector = cache.k_LUNGD.shape[-1]
    assert body(to_bytes(cache, "int8")) / body(to_bytes(cache)) == pytest.approx((per_vector + 4) / per_vector / 4,
                                                                                 rel=0.01)


def test_every_bit_counts(cache, tmp_path):
    """Whatever byte is altered, whatever is cut off: refused by name, never read, and out of a store's way."""
    content = to_bytes(cache.take(slice(0, 1)))
    assert from_bytes(content, "whole").image_digests == cache.image_digests[:1]
    random = np.random.default_rng(0)
    store, model, image = Store(tmp_path), cache.fingerprint, cache.image_digests[0]
    path = store.path(image, model, 2)
    path.parent.mkdir(parents=True)
    of_format = content.index(FORMAT.encode())
    for at in [*range(of_format, of_format + len(FORMAT)), *random.integers(0, len(content), 200)]:
        torn = bytearray(content)
        torn[at] ^= 1 << int(random.integers(8))
        with pytest.raises(CacheError, match=r"a\.safetensors"):
            from_bytes(bytes(torn), "a.safetensors")
        path.write_bytes(torn)
        with pytest.raises(DamagedCache, match=image):
            store.get(image, model, 2)
        assert not store.has(image, model, 2)
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        with pytest.raises(DamagedCache, match="torn or damaged"):
            from_bytes(content[:length], "a.safetensors")


def test_another_models_cache_is_refused_by_name(assistant, cache, tiny_config, words, tmp_path):
    other = Assistant(VocoLlama(tiny_config, nnx.Rngs(1), jnp.float32), words, template("short"))
    with pytest.raises(CacheError, match="the config is the same, but its parameters differ"):
        other.read(cache, ["what?"])
    deeper = dataclasses.replace(tiny_config, decoder=dataclasses.replace(tiny_config.decoder, depth=3))
    save(cache, tmp_path / "a.safetensors")
    with pytest.raises(CacheError, match=r"a\.safetensors is of another model: decoder\.depth is 2 there, 3 here"):
        load(tmp_path / "a.safetensors", fingerprint(VocoLlama(deeper, nnx.Rngs(0), jnp.float32), words))
    with pytest.raises(CacheError, match="cache 1 is of another model"):
        VocoCache.concat([cache, other.compress([np.zeros((32, 32, 3), np.uint8)])])
    unnamed = dataclasses.replace(cache, fingerprint=None)
    with pytest.raises(CacheError, match="cache 2 is of another model"):
        VocoCache.concat([unnamed, cache, other.compress([np.zeros((32, 32, 3), np.uint8)])])
    assert VocoCache.concat([unnamed, cache]).fingerprint is None
    narrow = VocoLlama(tiny_config, nnx.Rngs(0), jnp.bfloat16)
    assert "dtype is 'float32' there, 'bfloat16' here" in fingerprint(narrow, words).differences(cache.fingerprint)


def test_a_fingerprint_sees_every_parameter_and_every_place(tiny_model, words):
    before = fingerprint(tiny_model, words)
    assert fingerprint(tiny_model, words) == before
    parameters = parameters_of(tiny_model)
    assert len(parameters) > 20
    for name, value in parameters.items():
        flat = value.reshape(-1)
        changed = [flat.at[-1].add(1e-3).reshape(value.shape)]
        if flat.size > 1 and flat[0] != flat[1]:
            changed.append(flat.at[:2].set(flat[1::-1]).reshape(value.shape))  # two entries change places
        for new in changed:
            assert fingerprint(with_parameters(tiny_model, parameters | {name: new}), words) != before, name


def test_a_fingerprint_sees_the_tokens_around_the_image(tiny_model, words, llama_tokenizer):
    """Another tokenizer's BOS and newline give other keys, though no parameter differs."""
    before = fingerprint(tiny_model, words)
    other_bos = copy.copy(words)
    other_bos.bos_id = 2
    assert before.differences(fingerprint(tiny_model, other_bos)) == "unit_ids is [2, 4] there, [1, 4] here"
    assert fingerprint(tiny_model, llama_tokenizer) != before  # another newline
    same = word_tokenizer(["another vocabulary, but the same BOS and newline"])
    assert fingerprint(tiny_model, same) == before


def test_what_cannot_be_done_is_said(assistant, images, cache, tmp_path):
    for number in (0, 3):
        with pytest.raises(CacheError, match=f"2 VoCo tokens per unit cannot be truncated to {number}"):
            cache.truncate(number)
    with pytest.raises(CacheError, match="no cache to concatenate"):
        VocoCache.concat([])
    with pytest.raises(CacheError, match=r"cache 1 keeps 1 tokens .* truncate them to one number"):
        VocoCache.concat([cache, cache.truncate(1)])
    whole = compress_keeping(assistant.model, assistant.tokenizer, images[:1], 8)
    with pytest.raises(CacheError, match="whole units cannot be truncated"):
        whole.truncate(1)
    with pytest.raises(CacheError, match="keeps tokens from position 0 of a unit, text sees those from 6 on"):
        assistant.read(whole, ["what?"])
    with pytest.raises(CacheError, match="without its model's fingerprint"):
        save(whole, tmp_path / "a.safetensors")
    with pytest.raises(CacheError, match=r"missing\.safetensors: can't be read: No such file"):
        load(tmp_path / "missing.safetensors")
    foreign = to_safetensors({"keys": np.zeros(1, np.float32)}, {"format": "pt"})
    with pytest.raises(CacheError, match=r"is no VoCo cache of format .* but 'pt'"):
        from_bytes(foreign, "weights.safetensors")


def test_digests_are_of_content():
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert image_digest(image) == image_digest(np.asfortranarray(image)) != image_digest(image.reshape(2, 8, 3))
    a = Fingerprint(json.dumps({"x": {"y": 1}}), "p")
    assert a.digest == "6d3031f21bafb0517800f58d7dd42428"
    assert a.differences(Fingerprint(json.dumps({"x": {"y": 2}}), "p")) == "x.y is 2 there, 1 here"


@pytest.mark.parametrize(("entry", "value"), [
    ("images", '["/etc/passwd"]'), ("images", '["../../x"]'), ("images", "[]"), ("images", '"' + "a" * 32 + '"'),
    ("images", '["' + "A" * 32 + '"]'), ("images", '["' + "a" * 32 + '\\n"]'),
    ("images", "[" * 99_999), ("images", "[3]"),
    ("config", "[" * 99_999), ("config", "{" + '"a": {' * 200 + "}" * 201), ("config", '"text"'), ("position", "-1"),
    ("position", "9" * 5000), ("dtype", "complex64"),
])
def test_what_a_file_from_elsewhere_says_is_checked(entry, value):
    """Its digest is right: whoever wrote the file wrote that too. Digests become paths in a store."""
    arrays = {name: np.zeros((1, 1, 1, 1, 2), np.float32) for name in ("keys", "values")}
    metadata = {"format": files.FORMAT, "config": "{}", "parameters": "p", "position": "6", "dtype": "float32",
                "images": json.dumps(["a" * 32])}
    write = lambda said: files.to_safetensors(arrays, said | {"sha256": files._digest(said, arrays)})
    assert files.from_bytes(write(metadata), "elsewhere").image_digests == ("a" * 32,)
    with pytest.raises(files.DamagedCache, match=r"^elsewhere: torn or damaged") as error:
        files.from_bytes(write(metadata | {entry: value}), "elsewhere")
    assert len(str(error.value)) < 500


def test_keys_and_values_of_different_shapes_are_refused():
    arrays = {"keys": np.zeros((1, 1, 1, 1, 2), np.float32), "values": np.zeros((1, 1, 2, 1, 2), np.float32)}
    metadata = {"format": files.FORMAT, "config": "{}", "parameters": "p", "position": "6", "dtype": "float32",
                "images": json.dumps(["a" * 32])}
    with pytest.raises(files.DamagedCache, match="keys are"):
        files.from_bytes(files.to_safetensors(arrays, metadata | {"sha256": files._digest(metadata, arrays)}), "x")
