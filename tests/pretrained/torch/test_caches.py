"""Two stages in PyTorch are vocojax's, and caches are exchanged both ways."""

import json
import sys

import numpy as np
import pytest
import torch

from tests.pretrained.torch.test_single_pass import GREEDY, QUESTIONS, assert_same_answers, inputs_about, messages
from vocojax.config import VocoConfig
from vocojax.data.conversation import Turn
from vocojax.inference.caches import files
from vocojax.inference.caches.cache import VocoCache
from vocojax.models.voco import voco_windows

CONVERSATIONS = [(Turn("user", question),) for question in QUESTIONS]
UNITS = [[0], [2, 0, 1], [1, 2]]


@pytest.fixture(scope="module")
def ours(voco, images) -> VocoCache:
    """The images, compressed by vocojax."""
    return voco.assistant.compress(images)


@pytest.fixture(scope="module")
def theirs(voco, images):
    """The images, compressed by PyTorch."""
    return voco.model.compress(voco.processor(images=images)["pixel_values"])


def asked(pair, cache, units=UNITS):
    """Returns the inputs of the questions after units of a cache."""
    return pair.processor.apply_chat_template([messages(question, 0) for question in QUESTIONS], tokenize=True,
                                              voco_cache=cache, voco_units=units)


def test_a_cache_is_that_of_vocojax(voco, ours, theirs):
    np.testing.assert_allclose(theirs.keys, ours.k_LUNGD, atol=1e-5)
    np.testing.assert_allclose(theirs.values, ours.v_LUNGD, atol=1e-5)
    assert (theirs.first_position, theirs.image_digests) == (ours.first_position, ours.image_digests)
    assert theirs.fingerprint == (ours.fingerprint.config, ours.fingerprint.parameters)


@pytest.mark.parametrize("kept", [2, 1])
def test_text_after_a_cache_reads_as_in_vocojax(voco, ours, theirs, kept):
    ours, theirs = ours.truncate(kept), theirs.truncate(kept)
    expected = voco.assistant.generate_behind(ours, CONVERSATIONS, UNITS, GREEDY)
    inputs = asked(voco, theirs)
    with torch.no_grad():
        logits = voco.model(**inputs, voco_cache=theirs).logits[:, -1].numpy()
    is_text = np.isfinite(expected.logits_BV[0])  # `<voco>` is no answer there
    assert is_text.sum() == voco.model.config.num_tokens - 1
    np.testing.assert_allclose(logits[:, : len(is_text)][:, is_text], expected.logits_BV[:, is_text], atol=1e-4)
    found = voco.model.generate(**inputs, voco_cache=theirs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert_same_answers(found[:, inputs["input_ids"].shape[1] :], expected.ids_BT, voco.assistant.tokenizer.eos_id)


@pytest.mark.parametrize(("kind", "kept"), [("sequential", 2), ("nested", 4), ("nested", 1)])
def test_positions_may_be_sequential_and_windows_nested(kind, kept, images, request):
    pair = request.getfixturevalue(kind)
    cache = pair.model.compress(pair.processor(images=images)["pixel_values"]).truncate(kept)
    ours = pair.assistant.compress(images).truncate(kept)
    assert cache.fingerprint == (ours.fingerprint.config, ours.fingerprint.parameters)
    expected = pair.assistant.generate_behind(ours, CONVERSATIONS, UNITS, GREEDY)
    inputs = asked(pair, cache)
    found = pair.model.generate(**inputs, voco_cache=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert_same_answers(found[:, inputs["input_ids"].shape[1] :], expected.ids_BT, 2)
    with torch.no_grad():
        logits = pair.model(**inputs, voco_cache=cache).logits[:, -1].numpy()
    is_text = np.isfinite(expected.logits_BV[0])
    np.testing.assert_allclose(logits[:, : len(is_text)][:, is_text], expected.logits_BV[:, is_text], atol=1e-4)


@pytest.mark.parametrize("init", ["pool", "pool_nested"])
def test_windows_are_those_of_vocojax(nested, init):
    theirs = sys.modules[type(nested.model).__module__].voco_windows
    for num_vocos, side in ((1, 2), (2, 2), (3, 4), (6, 4), (8, 5), (16, 6)):
        ours = voco_windows(VocoConfig(num_vocos, init=init), side)
        assert np.array_equal(theirs(init, num_vocos, side).numpy(), ours)


def test_two_stages_are_a_single_pass(voco, images, theirs):
    whole = inputs_about(voco, (1, 2, 3), images)
    after = asked(voco, theirs, [[0], [0, 1], [0, 1, 2]])
    with torch.no_grad():
        expected = voco.model(**whole).logits[:, -1]
        torch.testing.assert_close(voco.model(**after, voco_cache=theirs).logits[:, -1], expected, atol=1e-5, rtol=0)
        fewer = voco.processor.apply_chat_template(
            [messages(question, 1) for question in QUESTIONS], tokenize=True, images=[images[:1]] * 3, num_vocos=1)
        short = theirs.truncate(1)
        torch.testing.assert_close(voco.model(**asked(voco, short, [[0]] * 3), voco_cache=short).logits[:, -1],
                                   voco.model(**fewer).logits[:, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"},
                                      {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_transformers_ways_to_generate(voco, images, theirs, settings):
    """Beams, and caches of other kinds, give the same answers in a single pass and in two stages."""
    whole = inputs_about(voco, (1, 2, 3), images)
    after = {**asked(voco, theirs, [[0], [0, 1], [0, 1, 2]]), "voco_cache": theirs}
    alone = [{**voco.processor(text="what color?", **about), **about} for about in ({"images": images[0]}, {
        "voco_cache": theirs.take(slice(0, 1))})]  # without padding, for which transformers makes no mask
    del alone[0]["images"]
    for single, two in ((whole, after), alone):
        answers = [voco.model.generate(**inputs, **settings, max_new_tokens=3, do_sample=False, pad_token_id=0)[
            :, inputs["input_ids"].shape[1] :] for inputs in (single, two)]
        assert torch.equal(*answers)


@pytest.mark.parametrize("storage", ["exact", "int8"])
def test_caches_travel_both_ways(voco, ours, theirs, tmp_path, storage):
    theirs.save(tmp_path / "theirs", storage)
    read = files.load(tmp_path / "theirs", voco.assistant.fingerprint)
    files.save(ours, tmp_path / "ours", storage)
    again = voco.model.load_cache(tmp_path / "ours")
    for found, expected in ((read.k_LUNGD, theirs.keys), (read.v_LUNGD, theirs.values), (again.keys, ours.k_LUNGD),
                            (again.values, ours.v_LUNGD)):
        np.testing.assert_allclose(found, expected, atol={"exact": 0, "int8": 0.02}[storage])
    answers = voco.assistant.read(read, QUESTIONS, UNITS, GREEDY)
    inputs = asked(voco, again)
    found = voco.model.generate(**inputs, voco_cache=again, max_new_tokens=5, do_sample=False, pad_token_id=0)
    if storage == "exact":
        texts = voco.processor.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert [text.strip() for text in texts] == [answer.strip() for answer in answers]


def test_bfloat16_caches_keep_their_bits(theirs, tmp_path, voco):
    theirs.to(torch.bfloat16).save(tmp_path / "cache")
    read = files.load(tmp_path / "cache")
    assert read.k_LUNGD.dtype.name == "bfloat16"
    np.testing.assert_array_equal(read.k_LUNGD.astype(np.float32), theirs.keys.to(torch.bfloat16).float())


def test_parts_and_concatenations(voco, theirs):
    parts = [theirs.take(slice(i, i + 1)) for i in range(3)]
    joined = type(theirs).concat(parts)
    assert torch.equal(joined.keys, theirs.keys) and joined.image_digests == theirs.image_digests
    with pytest.raises(ValueError, match="truncate them to one number first"):
        type(theirs).concat([parts[0], parts[1].truncate(1)])
    with pytest.raises(ValueError, match="no cache to concatenate"):
        type(theirs).concat([])
    with pytest.raises(ValueError, match="of 2 VoCo tokens per unit can't be truncated to 3"):
        theirs.truncate(3)


def test_another_model_s_cache_is_refused(voco, causal, theirs, ours, tmp_path):
    changed = torch.nn.Parameter(voco.model.lm_head.weight * 2, requires_grad=False)
    kept, voco.model.lm_head.weight = voco.model.lm_head.weight, changed
    try:
        with pytest.raises(ValueError, match="of another model: the config is the same, but its parameters differ"):
            voco.model(**asked(voco, theirs), voco_cache=theirs)
        other = voco.model.compress(voco.processor(images=np.zeros((8, 8, 3), np.uint8))["pixel_values"])
    finally:
        voco.model.lm_head.weight = kept
    other.save(tmp_path / "other")
    for load in (voco.model.load_cache, lambda path: files.load(path, voco.assistant.fingerprint)):
        with pytest.raises(ValueError, match="other is of another model: the config is the same, but its parameters"):
            load(tmp_path / "other")
    for use in (lambda: causal.model.compress(voco.processor(images=np.zeros((8, 8, 3), np.uint8))["pixel_values"]),
                lambda: causal.model.generate(**asked(causal, theirs), voco_cache=theirs, max_new_tokens=1)):
        with pytest.raises(ValueError, match="trained with the causal mask"):
            use()


def test_damage_is_noticed(voco, theirs, tmp_path):
    theirs.save(tmp_path / "cache")
    content = bytearray((tmp_path / "cache").read_bytes())
    content[-3] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    (tmp_path / "short").write_bytes(content[:-40])
    for name in ("flipped", "short"):
        with pytest.raises(ValueError, match=f"{name}: torn or damaged"):
            voco.model.load_cache(tmp_path / name)
    with pytest.raises(ValueError, match="storage must be 'exact' or 'int8', got 'half'"):
        theirs.save(tmp_path / "cache", "half")


def test_ids_of_other_units_are_refused(voco, theirs):
    inputs = asked(voco, theirs, [[0], [1], [2]])
    with pytest.raises(ValueError, match="the ids do not begin with the VoCo tokens of VocoCache"):
        voco.model(**{**inputs, "voco_units": None}, voco_cache=theirs)
    with pytest.raises(ValueError, match="voco_units must be a list of units"):
        asked(voco, theirs, [[0], [1], [3]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fingerprint_is_that_of_vocojax(voco, dtype):
    expected = type(voco.assistant).from_pretrained(voco.directory, dtype=dtype).fingerprint
    model = type(voco.model).from_pretrained(voco.directory, dtype=getattr(torch, dtype))
    assert model.fingerprint() == (expected.config, expected.parameters)
    assert json.loads(model.fingerprint().config)["dtype"] == dtype
