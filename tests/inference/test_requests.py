"""Requests: each row of a batch by its own settings, images of several units, and bad ones among good ones."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.test_videos import write_video
from vocojax.data.conversation import Turn, template
from vocojax.data.images import ImageError, prepare_units
from vocojax.errors import InputError
from vocojax.files import json_line
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.caches.files import DamagedCache
from vocojax.inference.caches.fingerprint import Fingerprint, image_digest
from vocojax.inference.caches.store import Store
from vocojax.inference.decoding.sampling import SamplingConfig, SamplingStatics
from vocojax.inference.decoding.text import AnswerText
from vocojax.inference.many import Question, answer_all, answer_many, read_questions
from vocojax.inference.requests import Request
from vocojax.inference.visuals import Frames, Video, Visual, prepare_visual
from vocojax.layout import LayoutError

QUESTIONS = ("what color is the shape?", "is the shape red?", "a picture of", "what?")
SHORT = SamplingConfig(max_new_tokens=4)

# Few combinations of what programs are compiled for, any values of the rest.
settings_of_a_row = st.builds(
    dataclasses.replace,
    st.builds(SamplingConfig, temperature=st.just(0.0)) | st.builds(
        SamplingConfig, temperature=st.sampled_from([0.7, 2.0]), top_k=st.sampled_from([0, 3]),
        top_p=st.sampled_from([1.0, 0.8]), repetition_penalty=st.sampled_from([1.3, 2.0])),
    max_new_tokens=st.sampled_from([5, 8]), stop=st.sampled_from([(), ("red",), ("shape", "blue")]),
    seed=st.integers(0, 2**32 - 1),
)


def ask(assistant, requests, **how):
    return list(answer_many(assistant, requests, progress=None, **how))


@settings(max_examples=4, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(QUESTIONS), st.lists(st.integers(0, 4), max_size=1), settings_of_a_row),
                min_size=3, max_size=4))
def test_a_batch_of_mixed_settings_gives_each_request_what_it_gets_alone(assistant, images, cache, rows):
    """Also requests without an image, from caches; and the same in a single pass."""
    units = cache.split()
    requests = [Request(q, tuple(units[u] for u in about), sampling) for q, about, sampling in rows]
    together = ask(assistant, requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = ask(assistant, [request])
        assert (answer.token_ids, answer.text, answer.finish_reason) == (
            alone.token_ids, alone.text, alone.finish_reason)
        assert answer.answer_tokens <= request.sampling.max_new_tokens
        assert answer.finish_reason == "stop" or answer.token_ids
    whole = [Request(q, tuple(images[u] for u in about), sampling) for q, about, sampling in rows]
    for request, answer in zip(ask(assistant, whole, way="single pass"), together, strict=True):
        assert request.token_ids == answer.token_ids


def test_a_reason_says_what_ended_an_answer(words):
    ids = words.encode("what color is the shape").ids
    text = AnswerText(words, ("the",), "shape")
    assert text.finish([*ids[:2], words.eos_id, words.eos_id]) == ("what color", "stop", tuple(ids[:2]))
    assert text.finish(ids[:3]) == ("what color is", "length", tuple(ids[:3]))
    assert text.finish(ids) == ("what color is", "stop_string", tuple(ids[:4]))
    assert AnswerText(words, (), "is").finish(ids) == ("what color", "stop", tuple(ids[:3]))


def test_length_limits_and_tokens_are_counted(assistant, cache):
    free = SamplingConfig(temperature=3.0, seed=5)
    limits = (1, 3, 7)
    requests = [Request(QUESTIONS[0], (cache.take(slice(0, 2)),), dataclasses.replace(free, max_new_tokens=n))
                for n in limits]
    answers = ask(assistant, requests)
    for answer, limit in zip(answers, limits, strict=True):
        assert answer.finish_reason == ("length" if answer.answer_tokens == limit else "stop")
        assert answer.token_ids == answers[-1].token_ids[:limit]
    sample = assistant.lay_out(requests[0].turns, 2)
    assert answers[0].prompt_tokens == 2 * 2 + len(sample) - sample.text_start
    whole = Request(QUESTIONS[0], tuple(np.zeros((2, 32, 32, 3), np.uint8)), SHORT)
    assert ask(assistant, [whole], way="single pass")[0].prompt_tokens == len(sample)


def test_a_bad_request_spoils_no_other(assistant, images, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"torn")
    good = [Request(q, (images[i],), SHORT) for i, q in enumerate(QUESTIONS)]
    bad = [Request("what?", (tmp_path / "torn.png",)), Request("red " * 3000, (images[0],)),
           Request("what?", (images[0].astype(np.float32),)), Request((Turn("user", "is?"), Turn("assistant", "no"))),
           Request("\ud800", (images[0],))]
    mixed = [good[0], bad[0], good[1], bad[1], bad[2], good[2], bad[3], bad[4], good[3]]
    for way in ("caches", "single pass"):
        answers = ask(assistant, mixed, way=way, batch_size=3)
        assert [a.text for a in answers if not a.error] == [a.text for a in ask(assistant, good, way=way)]
        errors = [a for a in answers if a.error]
        assert {a.finish_reason for a in errors} == {"error"} and not any(a.text or a.token_ids for a in errors)
        for answer, problem in zip(errors, ("torn.png", "there is room for", r"float32[32, 32, 3]", "user's turn",
                                            "not UTF-8"), strict=True):
            assert problem in answer.error
        assert all("there is room" in a.error for a in ask(assistant, [bad[1]] * 2, way=way))


def test_a_bound_answers_in_a_single_pass_and_leaves_the_store_alone(assistant, tmp_path):
    """An upper bound must never be read through the VoCo mask without anybody asking for it."""
    bound = Assistant(assistant.model, assistant.tokenizer, assistant.template, "causal")
    picture(1).save(tmp_path / "a.png")
    store, asked = Store(tmp_path / "store"), [Question((str(tmp_path / "a.png"),), QUESTIONS[0], seed=1)]
    ((_, answer),) = answer_all(bound, store, asked, SHORT)
    whole = bound.generate_whole([bound.load_images([tmp_path / "a.png"])], [(Turn("user", QUESTIONS[0]),)], SHORT)
    assert answer == {"answer": bound.texts(whole, SHORT)[0]} and not (tmp_path / "store").exists()
    with pytest.raises(InputError, match="the number of VoCo tokens can be chosen only where answers come from caches"):
        list(answer_all(bound, store, asked, SHORT, num_vocos=1))


def test_a_single_pass_needs_pixels(assistant, cache):
    with pytest.raises(InputError, match="a single pass needs the pixels of a visual, got its cache"):
        ask(assistant, [Request("what?", (cache,))], way="single pass")


def test_visuals_are_several(tmp_path):
    for one in ("photo.png", tmp_path):
        with pytest.raises(InputError, match=r"visuals must be a tuple, got .*: write \(visual,\) for one"):
            Request("what?", one)


def test_slots_of_answers_waste_at_most_a_fifth():
    slots = [SamplingStatics.of([SamplingConfig(max_new_tokens=n), SHORT]).slots for n in range(1, 2049)]
    assert slots[3] == 4 and slots[63] == 64 and slots[1024] == 1280 and len(set(slots)) < 45
    assert all(n <= s and (s == 4 or s - n <= s / 5) for n, s in enumerate(slots, 1))


def test_a_system_text_replaces_the_templates(tiny_model, words, images):
    assistant = Assistant(tiny_model, words, template("vicuna_v1"))
    own = Request("what?", (images[0],), SHORT, system="is red a color?")
    spans = template("vicuna_v1").spans(own.turns, "</s>")
    assert "".join(span.text for span in spans) == "is red a color? USER: what? ASSISTANT:"
    assert not any(span.is_target for span in spans)
    usual, changed = ask(assistant, [Request("what?", (images[0],), SHORT), own])
    assert changed.prompt_tokens < usual.prompt_tokens
    turns = (Turn("system", "is red a color?"), Turn("user", "what?"))
    assert ask(assistant, [Request(turns, (images[0],), SHORT)])[0].token_ids == changed.token_ids
    for name, text in (("short", "red USER: what? ASSISTANT:"), ("bare", "red what?")):
        spans = template(name).spans((Turn("system", "red"), Turn("user", "what?")), "</s>")
        assert "".join(span.text for span in spans) == text
    with pytest.raises(LayoutError, match="has a system turn that is not the first turn"):
        assistant.lay_out((Turn("user", "a"), Turn("system", "b"), Turn("user", "c")), 0)
    with pytest.raises(LayoutError, match="turn 1 is the user's, as the one before: join them into one"):
        assistant.lay_out((Turn("user", "a"), Turn("user", "c")), 0)


@pytest.fixture(scope="module")
def tiles(tiny_model, words) -> Assistant:
    return Assistant(tiny_model, words, template("short"), fit="anyres")


def picture(seed, width=70, height=40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_tiles_of_an_image_are_one_visual(tiles, tmp_path):
    """Anyres: several units per image, one entry of the store, the answers of a single pass."""
    for name in ("a", "b"):
        picture(ord(name)).save(tmp_path / f"{name}.png")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    requests = [Request(QUESTIONS[0], (files[0],), SHORT), Request(QUESTIONS[1], tuple(files), SHORT)]
    store = Store(tmp_path / "store")
    cached, again = ask(tiles, requests, store=store), ask(tiles, requests, store=store)
    single = ask(tiles, requests, way="single pass")
    assert [a.token_ids for a in cached] == [a.token_ids for a in again] == [a.token_ids for a in single]
    assert single[0].prompt_tokens > cached[0].prompt_tokens
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 2

    visual = tiles.visual(files[0])
    units = len(visual.units)
    assert units >= 3 and visual.digest not in map(image_digest, visual.units)
    entry = store.get(visual.digest, tiles.fingerprint, 2)
    assert entry.num_units == units and entry.image_digests == tuple(map(image_digest, visual.units))
    assert tiles.recall(store, files).num_units == 2 * units
    assert tiles.read(tiles.recall(store, files), QUESTIONS[1], sampling=SHORT) == [cached[1].text]

    path = store.path(visual.digest, tiles.fingerprint, 2)
    store.put_visual(VocoCache.concat([entry, entry]))
    path.write_bytes(store.path(VocoCache.concat([entry, entry]).digest, tiles.fingerprint, 2).read_bytes())
    with pytest.raises(DamagedCache, match="another image's"):
        store.get(visual.digest, tiles.fingerprint, 2)


def test_a_frame_has_no_tiles(tiles):
    whole = prepare_units(picture(0), 32, "anyres")[0]
    assert [unit.tolist() for unit in tiles.visual(Frames((picture(0),))).units] == [whole.tolist()]


def test_a_visual_of_one_unit_has_the_images_digest(assistant, images):
    assert Visual((images[0],)).digest == image_digest(images[0])
    assert Visual(tuple(images[:2])).digest != Visual(tuple(images[1::-1])).digest


def test_visuals_are_files_images_frames_or_arrays(assistant, images, tmp_path):
    picture(0).save(tmp_path / "a.png")
    from_file, from_image = assistant.visual(tmp_path / "a.png"), assistant.visual(picture(0))
    assert from_file.digest == from_image.digest
    frames = assistant.visual(Frames((picture(0), picture(1).convert("L"))))
    assert len(frames.units) == 2 and frames.units[0].tolist() == from_image.units[0].tolist()
    assert len(assistant.visual(np.stack(images)).units) == 5
    write_video(tmp_path / "a.mp4", frames=30)
    assert len(assistant.visual(Video(tmp_path / "a.mp4", frames=3)).units) == 3
    assert len(assistant.visual(Video(tmp_path / "a.mp4", frames=50)).units) == 30
    (tmp_path / "b.mp4").write_bytes(b"")
    (empty,) = ask(assistant, [Request("what?", (Video(tmp_path / "b.mp4"),))])
    assert "b.mp4': cannot be decoded" in empty.error
    for one in (tmp_path / "a.png", str(tmp_path / "a.png"), picture(0), [picture(0)]):
        assert assistant.compress(one).image_digests == (from_file.digest,)
    assert assistant.recall(Store(tmp_path / "store"), picture(0)).image_digests == (from_file.digest,)
    wide = np.asarray(picture(0).resize((50, 20)))  # an array of any size is an image
    same = assistant.visual(Image.fromarray(wide)).units[0].tolist()
    assert assistant.visual(wide).units[0].tolist() == same
    assert [unit.tolist() for unit in assistant.visual(np.stack([wide, wide])).units] == [same, same]
    for wrong in (images[0].astype(np.float32), np.zeros((32, 32), np.uint8), np.zeros((0, 32, 32, 3), np.uint8),
                  np.zeros((3, 32, 40), np.uint8)):
        with pytest.raises(ImageError, match=r"array.*must be uint8 RGB \[height, width, 3\], or several .*, got"):
            prepare_visual(wrong, 32, "pad")
    for url in ("https://example.org/a.png", "data:image/png;base64,AAAA"):
        with pytest.raises(ImageError, match="is a URL, and nothing is downloaded: pass a file, its bytes, or a PIL"):
            prepare_visual(url, 32, "pad")
    with pytest.raises(ImageError, match="has no image"):
        prepare_visual(Frames(()), 32, "pad")


def test_one_question_is_answered_like_a_list_of_one(assistant, cache):
    assert assistant.read(cache, "what?", sampling=SHORT) == assistant.read(cache, ["what?"], sampling=SHORT)
    pieces = list(assistant.stream(cache, "what?", sampling=SHORT))
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == assistant.read(cache, "what?", sampling=SHORT)


def test_caches_of_one_batch_may_keep_different_numbers_of_tokens(assistant, images, cache):
    """Each gets what it gets alone; a request that mixes them, or has another model's, gets an error of its own."""
    ask = "what color is the shape?"
    one = cache.take(slice(0, 1))
    foreign = dataclasses.replace(one, fingerprint=Fingerprint("{}", "other"))
    asked = [(one,), (one.truncate(1),), (), (one, one.truncate(1)), (foreign,), (images[1],),
             (cache.take(slice(1, 2)),)]
    requests = [Request(ask, visuals, SHORT) for visuals in asked]
    together = list(answer_many(assistant, requests, progress=None))
    assert "keep [1, 2] tokens per unit: truncate them to one number" in together[3].error
    assert "a cache of the request is of another model" in together[4].error
    for index in (0, 1, 2, 5, 6):
        (alone,) = answer_many(assistant, requests[index : index + 1], progress=None)
        assert not together[index].error and together[index].token_ids == alone.token_ids, index
    short = list(answer_many(assistant, requests[:2], num_vocos=2, progress=None))
    assert not short[0].error and "cannot be truncated to 2" in short[1].error


def test_a_bad_text_or_visual_spoils_no_other(assistant, images):
    """Lone surrogates, paths that no system call takes, broken images, and a very long question."""
    good = Request("what color is the shape?", (images[0],), SHORT)
    bad = [Request("what \ud800 color?", (images[0],), SHORT), Request("what?", ("a\0b.png",), SHORT),
           Request("what?", ("\ud800.png",), SHORT), Request("what?", (b"no image",), SHORT),
           Request("what?", (Image.new("RGB", (0, 5)),), SHORT), Request("what?", (Frames(("x",)),), SHORT),
           Request("what?", (np.zeros(3, np.uint8),), SHORT), Request("color " * 12_000, (images[0],), SHORT)]
    answers = list(answer_many(assistant, [*bad, good], progress=None))
    assert [bool(answer.error) for answer in answers] == [True] * len(bad) + [False]
    assert all(len(answer.error) < 400 for answer in answers)


def test_questions_with_lone_surrogates_are_answered_and_written(assistant, images, tmp_path):
    file = tmp_path / "q.jsonl"
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    line = {"image": str(tmp_path / "a.png"), "question": "what color is the shape?", "note": "\ud800"}
    file.write_text("\n".join(json.dumps(line | change) for change in (
        {}, {"question": "what \ud800 color?"}, {"image": "\udfff.png"})))
    found = [answer for _, answer in answer_all(assistant, Store(tmp_path / "store"), read_questions(file), SHORT)]
    assert ["answer" in answer for answer in found] == [True, False, False]
    assert json.loads(json_line({**line, **found[0]}, "utf-8"))["note"] == "\ud800"


def test_visuals_are_bytes_too(assistant, images, tmp_path):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    digests = {assistant.compress(source).image_digests for source in (
        content, [content], tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(images[0]), images[0])}
    assert digests == {(image_digest(images[0]),)}


def test_an_image_in_memory_is_read_like_its_file(assistant):
    """Deep greyscale is not clipped at 255."""
    deep = Image.fromarray(np.full((32, 32), 30_000, np.uint16))
    assert assistant.visual(deep).units[0].max() == 30_000 >> 8


@pytest.mark.parametrize("more", [{"units": [[0]]}, {"seeds": [1]}, {"seeds": [1, 2, 3]}])
def test_lists_that_do_not_match_the_questions_are_refused(assistant, cache, more):
    with pytest.raises(InputError, match=f"{next(iter(more))} must be one"):
        assistant.read(cache, ["what color is the shape?"] * 2, **more)


def test_sixty_four_bit_jax_changes_nothing(assistant, images, cache):
    ask = ["what color is the shape?"]
    want = assistant.read(cache, ask, sampling=SHORT)
    with jax.enable_x64(True):
        again = assistant.compress(images)
        assert again.k_LUNGD.dtype == cache.k_LUNGD.dtype and assistant.read(again, ask, sampling=SHORT) == want
