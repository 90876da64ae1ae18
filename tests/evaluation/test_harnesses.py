"""Adapters of lmms-eval and VLMEvalKit: messages, settings, batches and errors. The packages are stand-ins, unless they
are installed; see stand_ins.py."""

import importlib
import logging
import sys
import types

import numpy as np
import pytest
from PIL import Image

from tests.evaluation import stand_ins
from vocojax.data.conversation import Turn, template
from vocojax.errors import InputError
from vocojax.evaluation.harnesses import answering
from vocojax.evaluation.harnesses.messages import Message, generation_of, request_of
from vocojax.inference.assistant import Assistant
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.many import answer_many
from vocojax.inference.requests import Request

SETTINGS = {"max_new_tokens": 3, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, {"max_new_tokens": 7, "seed": 5}),
    (SETTINGS, {"max_new_tokens": 3, "seed": 5}),
    ({"until": "\n\n"}, {"max_new_tokens": 7, "stop": ("\n\n",), "seed": 5}),
    ({"until": ["</s>", "Q:"], "temperature": None}, {"max_new_tokens": 7, "stop": ("</s>", "Q:"), "seed": 5}),
    ({"until": None, "top_p": 0, "do_sample": False}, {"max_new_tokens": 7, "seed": 5}),  # greedy: no mass is asked for
    ({"temperature": 0.2}, {"max_new_tokens": 7, "temperature": 0.2, "seed": 5}),
    ({"temperature": 0.2, "do_sample": False}, {"max_new_tokens": 7, "seed": 5}),
    ({"do_sample": True, "top_k": 4, "top_p": 0.9}, {"max_new_tokens": 7, "temperature": 1.0, "top_k": 4, "top_p": 0.9,
                                                     "seed": 5}),
    ({"repetition_penalty": 1.2, "seed": 1}, {"max_new_tokens": 7, "repetition_penalty": 1.2, "seed": 1}),
])
def test_generation_settings(settings, expected):
    assert generation_of(settings, 7, 5, longest=9) == (SamplingConfig(**expected), {})


@pytest.mark.parametrize(("settings", "message"), [
    ({"num_beams": 4}, "num_beams is 4, but beam search is not supported; set num_beams=1"),
    ({"max_new_tokens": "many"}, "generation settings .*max_new_tokens must be a whole number"),
    ({"until": [""]}, "generation settings .*'until'.* must hold no empty string"),
    ({"until": 5}, "generation settings .*'until': 5.*must be a tuple of strings"),
    ({"temperature": -1}, "temperature must be >= 0"),
    ({"temperature": 1, "top_p": 0}, r"top_p must be in \(0, 1\]"),
])
def test_settings_that_can_not_be_followed_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        generation_of(settings, 7, 5, longest=9)


def test_settings_that_are_not_followed_are_returned():
    found = generation_of({"max_new_tokens": 49152, "image_aspect_ratio": "pad"}, 7, 5, longest=9)
    assert found.sampling == SamplingConfig(max_new_tokens=9, seed=5)
    assert found.unused == {"max_new_tokens": 49152, "image_aspect_ratio": "pad"}


def test_messages_become_turns_with_all_visuals_in_front():
    request = request_of([Message("system", ("Be brief.",)), Message("user", ("What", "", "is it?"), ("a.png",)),
                          Message("assistant", ("A dog.",)), Message("user", ("And",)),
                          Message("user", ("here?",), ("b.png", "c.png"))], SamplingConfig())
    assert request.turns == (Turn("system", "Be brief."), Turn("user", "What\nis it?"), Turn("assistant", "A dog."),
                             Turn("user", "And\nhere?"))
    assert request.visuals == ("a.png", "b.png", "c.png")
    with pytest.raises(InputError, match="has the role 'tool'; known: system, user, assistant"):
        request_of([Message("tool", ("x",))], SamplingConfig())


@pytest.fixture(scope="module")
def assistant(tiny_model, words):
    return Assistant(tiny_model, words, template("short"))


@pytest.fixture
def opened(assistant, monkeypatch):
    """Opens an adapter's model with the tiny assistant in place of a directory's; the pixels that it compresses."""
    monkeypatch.setattr(Assistant, "from_pretrained", lambda directory, **_: assistant)
    compressed, compress = [], assistant.compress
    monkeypatch.setattr(assistant, "compress", lambda visuals, batch_size: (
        compressed.extend(visual.digest for visual in visuals), compress(visuals, batch_size))[1])
    stand_ins.install(monkeypatch)

    def opened(adapter, **arguments):
        module = importlib.import_module(f"vocojax.evaluation.harnesses.{adapter}")
        return module.VocojaxModel("somewhere", **arguments)

    opened.compressed = compressed
    return opened


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def ask(model, documents, settings=SETTINGS, numbers=None):
    """Answers documents, each the messages of one, as lmms-eval asks them."""
    model.task_dict = {"task": {"test": [list(messages) for messages in documents]}}
    numbers = range(len(documents)) if numbers is None else numbers
    requests = [types.SimpleNamespace(args=("context", lambda doc: doc, settings, number, "task", "test"))
                for number in numbers]
    return model.generate_until(requests)


def user(text, *images):
    return {"role": "user", "content": [*({"type": "image", "url": image} for image in images),
                                        {"type": "text", "text": text}]}


QUESTION = "what color is the shape ?"


def test_lmms_eval_is_answered_in_batches_and_every_image_compressed_once(opened, assistant, tmp_path):
    images = [picture(seed) for seed in range(3)]
    images[2].save(tmp_path / "c.png")
    documents = [
        [user(QUESTION, images[0])],
        [{"role": "system", "content": [{"type": "text", "text": "yes no"}]}, user(QUESTION, images[1].copy())],
        [user("is the shape red ?", images[0].copy())],  # the same pixels, decoded again
        [user(QUESTION, images[0], str(tmp_path / "c.png"))],
        [user("red ?")],
        [user(QUESTION, images[1]), {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
         {"role": "user", "content": "green ?"}],
    ]
    found = ask(opened("lmms_eval", batch_size=2), documents)
    assert len(opened.compressed) == 3
    three = SamplingConfig(max_new_tokens=3)
    requests = [Request(QUESTION, (images[0],), three), Request(QUESTION, (images[1],), three, system="yes no"),
                Request("is the shape red ?", (images[0],), three), Request(QUESTION, (images[0], images[2]), three),
                Request("red ?", (), three),
                Request((Turn("user", QUESTION), Turn("assistant", "red"), Turn("user", "green ?")), (images[1],),
                        three)]
    expected = list(answer_many(assistant, requests, batch_size=2, progress=None))
    assert [result.text for result in found] == [answer.text.strip() for answer in expected]
    assert [(result.token_counts.input_tokens, result.token_counts.output_tokens) for result in found] == [
        (answer.prompt_tokens, answer.answer_tokens) for answer in expected]
    assert any(result.text for result in found)


def test_lmms_eval_draws_do_not_depend_on_batches_and_differ_between_repeats(opened):
    documents = [[user(QUESTION, picture(0))], [user(QUESTION, picture(1))]]
    draw = {"max_new_tokens": 8, "temperature": 5.0}
    found = [result.text for result in ask(opened("lmms_eval", batch_size="2"), documents, draw, [1, 1, 0])]
    again = [result.text for result in ask(opened("lmms_eval", batch_size=3), documents, draw, [0, 1, 1])]
    assert found[0] != found[1] and again == [found[2], *found[:2]]


def test_lmms_evals_rounds(opened):
    def doc_to_messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return doc
        seen.append((round_idx, previous_output, previous_round_info))
        return [user("red ?")], round_idx > doc[0]["rounds"], None, f"note {round_idx}"

    seen = []
    model = opened("lmms_eval", batch_size=2)
    model.task_dict = {"task": {"test": [[{**user(QUESTION, picture(0)), "rounds": rounds}] for rounds in (1, 0)]}}
    found = model.generate_until_multi_round([
        types.SimpleNamespace(args=("", doc_to_messages, SETTINGS, number, "task", "test")) for number in (0, 1)])
    assert [len(texts) for texts in found] == [2, 1]
    assert seen == [(1, found[0][:1], None), (1, found[1], None), (2, found[0], "note 1")]


@pytest.mark.parametrize(("part", "message"), [
    ({"type": "audio", "url": "a.wav"}, "task task, document 0: a message holds audio; this model reads texts, images"),
    ({"type": "video", "url": {"path": "a.mp4", "video_start": 3}}, r"document 0: .*a part of a video \(video_start\)"),
    ({"type": "video", "url": "a.mp4", "end_time": 3.0}, r"document 0: .*a part of a video \(end_time\)"),
    ({"type": "image", "url": "nowhere.png"}, "1 requests can't be answered: task task, document 0 .*nowhere.png"),
    ({"type": "video", "url": {"path": "nowhere.mp4"}}, "1 requests can't be answered: .*nowhere.mp4"),
])
def test_what_lmms_eval_can_not_be_answered_is_named(opened, part, message):
    with pytest.raises(InputError, match=message):
        ask(opened("lmms_eval"), [[{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]])


def test_settings_of_a_task_that_are_not_followed_are_reported_once(opened, caplog):
    with caplog.at_level(logging.WARNING, "vocojax"):
        ask(opened("lmms_eval"), [[user("red ?")], [user("blue ?")]], SETTINGS | {"image_aspect_ratio": "pad"})
    assert [record.getMessage() for record in caplog.records] == [
        "task task: generation settings that vocojax does not follow: image_aspect_ratio='pad'"]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"conv_template": "v1", "num_voco": 1}, "the model has no argument conv_template, num_voco; known: .*num_vocos"),
    ({"batch_size": "auto"}, "--batch_size must be a whole number >= 1, got 'auto'"),
    ({"device": "cuda"}, "--device is 'cuda', but JAX finds its devices; leave it out"),
])
def test_arguments_of_lmms_eval_that_are_refused(opened, arguments, message):
    with pytest.raises(InputError, match=message):
        opened("lmms_eval", **arguments)


def test_lmms_evals_other_kinds_of_tasks(opened):
    with pytest.raises(InputError, match="choose tasks with output_type generate_until"):
        opened("lmms_eval").loglikelihood([])


def test_the_entry_point_names_the_adapter(monkeypatch):
    stand_ins.install(monkeypatch)
    manifest = importlib.import_module("vocojax.evaluation.harnesses.registration").MANIFEST
    module, _, name = manifest.chat_class_path.rpartition(".")
    assert manifest.model_id == "vocojax" and not importlib.import_module(module).__dict__[name].is_simple
    sys.modules.pop(module)


def test_vlmevalkit(opened, assistant, tmp_path):
    for seed, name in enumerate("ab"):
        picture(seed).save(tmp_path / f"{name}.png")
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    model = opened("vlmevalkit", max_new_tokens=3, batch_size=1)
    image = lambda path: {"type": "image", "value": path}
    text = lambda value, **role: {"type": "text", "value": value, **role}
    short, turns = SamplingConfig(max_new_tokens=3), (Turn("user", QUESTION), Turn("assistant", "red"),
                                                      Turn("user", "blue ?"))
    one, two, three = answer_many(assistant, [
        Request(f"{QUESTION}\nred ?", (a, b), short), Request("red ?", (b,), short, system="yes no"),
        Request(turns, (a,), short)], batch_size=1, progress=None)
    opened.compressed.clear()
    assert model.generate([image(a), text(QUESTION), image(b), text("red ?")], "MMMU") == one.text.strip()
    assert model.generate([image(b), text("red ?", role="user"), text("yes no", role="system")]) == two.text.strip()
    assert len(opened.compressed) == 2  # each of the two files once
    assert model.chat_inner([{"role": "user", "content": [image(a), text(QUESTION)]},
                             {"role": "assistant", "content": [text("red")]},
                             {"role": "user", "content": [text("blue ?")]}]) == three.text.strip()
    with pytest.raises(InputError, match=r"a message can't be answered: .*nowhere.png"):
        model.generate([image("nowhere.png"), text(QUESTION)])
    with pytest.raises(InputError, match="a message holds audio"):
        model.generate_inner([{"type": "audio", "value": "a.wav"}])
    with pytest.raises(InputError, match="the model has no argument conv; known: "):
        opened("vlmevalkit", conv="v1")


def test_caches_lie_in_the_users_store_or_vanish(opened, tmp_path):
    model = answering.Answering("somewhere", store=tmp_path / "caches")
    model.answers([Request(QUESTION, (picture(0),), SamplingConfig(max_new_tokens=1))])
    assert len(list((tmp_path / "caches").rglob("*.safetensors"))) == 1
