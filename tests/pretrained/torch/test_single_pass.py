"""A single pass in PyTorch is vocojax's: logits, greedy tokens, positions, for any number of images and padding."""

import jax
import numpy as np
import pytest
import torch

from vocojax import SamplingConfig
from vocojax.data.conversation import Turn
from vocojax.inference.prompts import whole_rows

QUESTIONS = ("what color is the shape?", "is a red shape a picture of the blue shape?", "red or green?")
GREEDY = SamplingConfig(max_new_tokens=5)


def messages(question, count):
    """One user turn about so many images, which are given apart."""
    return [{"role": "user", "content": [*[{"type": "image"}] * count, {"type": "text", "text": question}]}]


def inputs_about(pair, counts, images, **kwargs):
    """Returns the inputs of one batch of prompts about 0, 1, ... of the images each."""
    return pair.processor.apply_chat_template(
        [messages(question, count) for question, count in zip(QUESTIONS, counts, strict=True)], tokenize=True,
        images=[images[:count] for count in counts], **kwargs)


def prompts_about(pair, counts, images):
    """Returns the same prompts in vocojax: layouts and prepared images."""
    samples = [pair.assistant.lay_out((Turn("user", question),), count)
               for question, count in zip(QUESTIONS, counts, strict=True)]
    return samples, [pair.assistant.load_images(images[:count]) for count in counts]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["voco", "causal"])
def test_logits_are_those_of_vocojax(kind, side, images, request):
    pair = request.getfixturevalue(kind)
    counts = (0, 1, 3)
    inputs = inputs_about(pair, counts, images, padding_side=side)
    samples, units = prompts_about(pair, counts, images)
    model = pair.assistant.model
    rows = whole_rows(samples, units, model.config, pair.assistant.visibility, 128)
    expected = np.asarray(jax.jit(lambda model, rows: model.decoder.logits(model(rows)[0]))(model, rows))
    with torch.no_grad():
        logits = pair.model(**inputs).logits.numpy()
    tokens = model.config.decoder.num_tokens
    assert (logits[..., tokens:] < -1e30).all()
    for row, sample in enumerate(samples):
        own = inputs["attention_mask"][row].bool().numpy()
        assert own.sum() == len(sample)
        np.testing.assert_allclose(logits[row, own][:, :tokens], expected[row, : len(sample), :tokens], atol=1e-4)


@pytest.mark.parametrize("kind", ["voco", "causal"])
def test_greedy_tokens_are_those_of_vocojax(kind, images, request):
    pair = request.getfixturevalue(kind)
    inputs = inputs_about(pair, (0, 1, 3), images)
    _, units = prompts_about(pair, (0, 1, 3), images)
    expected = pair.assistant.generate_whole(
        units, [(Turn("user", question),) for question in QUESTIONS], GREEDY).ids_BT[:, :5]
    found = pair.model.generate(**inputs, max_new_tokens=5, do_sample=False, min_new_tokens=5, pad_token_id=0)
    assert found[:, inputs["input_ids"].shape[1] :].shape == (3, 5)
    assert_same_answers(found[:, inputs["input_ids"].shape[1] :], expected, pair.assistant.tokenizer.eos_id)


def assert_same_answers(found, expected, eos):
    """The tokens are the same up to the end token."""
    for ours, theirs in zip(np.asarray(found).tolist(), np.asarray(expected).tolist(), strict=True):
        until = theirs.index(eos) if eos in theirs else len(theirs)
        assert ours[:until] == theirs[:until]
