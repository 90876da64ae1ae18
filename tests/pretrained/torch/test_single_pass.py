"""A single pass in PyTorch is vocojax's: logits, greedy tokens, positions, for any number of images and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.pretrained.torch.conftest import open_pair
from vocojax import SamplingConfig
from vocojax.data.conversation import Turn
from vocojax.inference.assistant import Assistant
from vocojax.inference.prompts import whole_rows
from vocojax.models.parameters import parameters_of, with_parameters
from vocojax.pretrained.loading import save_model
from vocojax.runs.card import ModelCard

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
@pytest.mark.parametrize("kind", ["voco", "causal", "sequential", "nested"])
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


def test_tiles_are_units(voco, words, tiny_config, tiny_model, images, tmp_path):
    """With `anyres` an image is several units: the whole image and its tiles."""
    save_model(tiny_model, ModelCard(tiny_config, words, "short", "anyres"), tmp_path / "export")
    pair = open_pair(tmp_path / "export")
    inputs = pair.processor.apply_chat_template(messages(QUESTIONS[0], 1), tokenize=True, images=[images[1]])
    units = list(pair.assistant.visual(images[1]).units)
    assert inputs["pixel_values"].shape[:2] == (1, len(units)) and len(units) > 2
    expected = pair.assistant.generate_whole([units], [(Turn("user", QUESTIONS[0]),)], GREEDY)
    found = pair.model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert_same_answers(found[:, inputs["input_ids"].shape[1] :], expected.ids_BT, words.eos_id)
    cache = pair.model.compress(inputs["pixel_values"])
    assert cache.image_digests == pair.assistant.compress(images[1]).image_digests


def test_bfloat16_is_right_within_its_rounding(voco, images):
    """PyTorch's distance from float32 is that of vocojax: less than twice as large."""
    inputs = inputs_about(voco, (0, 1, 3), images, padding_side="right")
    samples, units = prompts_about(voco, (0, 1, 3), images)
    exact, theirs = (
        type(voco.model).from_pretrained(voco.directory, dtype=dtype)(**inputs).logits.detach().float().numpy()
        for dtype in (torch.float32, torch.bfloat16))
    assistant = Assistant.from_pretrained(voco.directory, dtype="bfloat16")
    rows = whole_rows(samples, units, assistant.model.config, "voco", exact.shape[1])
    ours = np.asarray(jax.jit(lambda model, rows: model.decoder.logits(model(rows)[0]))(assistant.model, rows))
    tokens = assistant.model.config.decoder.num_tokens
    own = inputs["attention_mask"].bool().numpy()
    off = [np.abs(x[own][:, :tokens] - exact[own][:, :tokens]) for x in (theirs, ours)]
    assert 0 < off[0].max() < 2 * off[1].max() and off[0].mean() < 1.2 * off[1].mean()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # flex_attention is not compiled
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_every_implementation_of_attention(voco, images, attention):
    inputs = inputs_about(voco, (0, 1, 3), images)
    other = type(voco.model).from_pretrained(
        voco.directory, attn_implementation={"text_config": attention, "vision_config": "sdpa"}).eval()
    own = inputs["attention_mask"].bool()
    with torch.compiler.set_stance("force_eager"):  # what flex_attention means, without a compiler
        with torch.no_grad():
            torch.testing.assert_close(other(**inputs).logits[own], voco.model(**inputs).logits[own], atol=1e-5, rtol=0)
        answers = [model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
                   for model in (other, voco.model)]
    assert torch.equal(*answers)


def test_attention_without_such_masks_is_refused(voco, images):
    decoder = voco.model.model.language_model.config
    decoder._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(ValueError, match="'flash_attention_2' can't take the VoCo mask"):
            voco.model(**inputs_about(voco, (0, 1, 3), images))
    finally:
        decoder._attn_implementation = "sdpa"


def test_it_learns_as_in_vocojax(voco, images):
    """The loss of some targets, and its gradients in the decoder, the projector and the embedding."""
    inputs = inputs_about(voco, (0, 1, 3), images, padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[inputs["input_ids"] >= voco.model.config.num_tokens] = -100  # images are no targets
    samples, units = prompts_about(voco, (0, 1, 3), images)
    model = voco.assistant.model
    rows = whole_rows(samples, units, model.config, "voco", labels.shape[1])
    wanted = labels[:, 1:].numpy()

    def loss_of(parameters, rows):
        own = with_parameters(model, parameters)
        logs = jax.nn.log_softmax(own.decoder.logits(own(rows)[0])[:, :-1])
        picked = jnp.take_along_axis(logs, np.maximum(wanted, 0)[..., None], -1)[..., 0]
        return -(picked * (wanted >= 0)).sum() / (wanted >= 0).sum()

    expected, gradients = jax.jit(jax.value_and_grad(loss_of))(parameters_of(model), rows)
    voco.model.zero_grad()
    loss = voco.model(**inputs, labels=labels).loss
    loss.backward()
    np.testing.assert_allclose(loss.detach(), expected, atol=1e-5)
    inner = voco.model.model
    for path, parameter in (("decoder/blocks/query/kernel", inner.language_model.layers[0].self_attn.q_proj.weight),
                            ("projector/linear_in/kernel", inner.multi_modal_projector.linear_1.weight),
                            ("decoder/embedding", inner.language_model.embed_tokens.weight)):
        ours = gradients[path][0].T if "blocks" in path else gradients[path]
        ours = ours.T if path.startswith("projector") else ours
        assert np.abs(ours).max() > 1e-3
        np.testing.assert_allclose(parameter.grad[: len(ours)], ours, atol=1e-5, err_msg=path)
    voco.model.zero_grad()
