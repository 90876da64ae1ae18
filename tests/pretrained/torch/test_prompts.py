"""The processor's prompts and pixels are vocojax's, for every template, tokenizer and fit."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from vocojax import testing
from vocojax.data.conversation import TEMPLATES, Turn
from vocojax.data.images import Fit, decode, prepare_units
from vocojax.pretrained import pytorch
from vocojax.pretrained.loading import save_model
from vocojax.pretrained.processor import Processor
from vocojax.runs.card import ModelCard

FITS = Fit.__args__


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory, llama_tokenizer):
    """The processor of an export with LLaMA's kind of tokenizer, in PyTorch and in vocojax."""
    config = testing.tiny_config(llama_tokenizer)
    directory = tmp_path_factory.mktemp("sentencepiece") / "export"
    save_model(testing.tiny_model(config), ModelCard(config, llama_tokenizer, "vicuna_v1", "crop"), directory)
    return AutoProcessor.from_pretrained(directory, trust_remote_code=True), Processor.from_pretrained(directory)


def sources(pair, name):
    """Returns a module of the sources, as transformers has loaded it."""
    return sys.modules[f"{type(pair.processor).__module__.rpartition('.')[0]}.{name}"]


LITERALS = ["<image>\nwhat?", "a <image> b", "x\n<image>", "<image><video>"]
TEXTS = st.text("a<>\n é", max_size=8) | st.sampled_from(LITERALS)
TURNS = st.lists(TEXTS, min_size=1, max_size=4)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@given(texts=TURNS, system=st.none() | TEXTS.filter(lambda text: "<" not in text), first=st.booleans())
@settings(max_examples=40, deadline=None)
def test_chat_templates_write_what_templates_do(voco, name, texts, system, first):
    roles = ("user", "assistant") if first or name == "plain" else ("assistant", "user")
    turns = [Turn("system", system)] if system is not None else []
    turns += [Turn(roles[i % 2], text) for i, text in enumerate(texts)]
    count = sum(text.count("<image>") for text in texts)
    expected = "".join(span.text for span in TEMPLATES[name].spans(tuple(turns), "</s>", count > 0))
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    written = voco.processor.apply_chat_template(messages, chat_template=pytorch.chat_template(name))
    assert written == "<image>" * count + expected


@pytest.mark.parametrize("question", ["What is the color of the bus?", "bus?\nAnswer", " two  spaces ", "é 字"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_ids_are_those_of_a_sentencepiece_tokenizer(sentencepiece, question, count):
    theirs, ours = sentencepiece
    images = [Image.new("RGB", (40, 30))] * count
    content = [*[{"type": "image", "image": image} for image in images], {"type": "text", "text": question}]
    inputs = theirs.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
    layout = ours(images, question).layout
    image_id = theirs.tokenizer.convert_tokens_to_ids("<image>")
    expected = np.where(layout.roles == 2, image_id, layout.ids)
    assert inputs["input_ids"][0].tolist() == expected.tolist()
    assert inputs.get("pixel_values", np.zeros((1, 0))).shape[1] == count


def test_the_released_prompt_string_is_understood(sentencepiece):
    """LLaVA writes the marker into the user's turn; images come first all the same."""
    theirs, _ = sentencepiece
    image = Image.new("RGB", (32, 32))
    written = theirs(images=image, text="A chat. USER: <image>\nWhat? ASSISTANT:")
    assert written["input_ids"].tolist() == theirs(images=image, text="A chat. USER: What? ASSISTANT:")[
        "input_ids"].tolist()


@pytest.mark.parametrize("fit", FITS)
@given(width=st.integers(1, 90), height=st.integers(1, 90), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_pixels_of_every_fit(voco, fit, width, height, seed):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    module = sources(voco, "image_processing_voco_llava")
    for found, expected in zip(module.prepare_units(image, 32, fit), prepare_units(image, 32, fit), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "I;16", "I", "F", "CMYK"])
def test_pixels_of_every_kind_of_file(voco, tmp_path, mode):
    values = np.arange(24 * 20).reshape(20, 24)
    if mode == "I;16":
        image = Image.fromarray((values * 130).astype(np.uint16))
    elif mode in ("I", "F"):
        image = Image.fromarray((values * 3).astype(np.int32 if mode == "I" else np.float32))
    else:
        image = Image.fromarray((values % 256).astype(np.uint8)).convert("RGBA").convert(
            "L" if mode in ("LA", "P", "1") else "RGB").convert(mode)
    path = tmp_path / "image.tiff"
    image.save(path)
    found = sources(voco, "image_processing_voco_llava").open_image(path)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(decode(path.read_bytes(), "image")))


def test_a_photo_is_not_turned(voco, tmp_path):
    image = Image.fromarray(np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3))
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    part = {"type": "image", "path": str(tmp_path / "photo.png")}
    message = {"role": "user", "content": [part, {"type": "text", "text": "what?"}]}
    pixels = voco.processor.apply_chat_template([message], tokenize=True)["pixel_values"]
    np.testing.assert_array_equal(pixels[0, 0].permute(1, 2, 0), voco.assistant.load_images([image])[0])


@pytest.mark.parametrize(("images", "text", "problem"), [
    (1, "a <voco>", "contains the reserved token '<voco>'"),
    (2, ["<image>a", "b"], "there are 2 images, and \\[1, 0\\] markers"),
    ([[1], [1]], ["<image><image>a", "b"], "\\[2, 0\\] markers <image>, but \\[1, 1\\] images"),
    (0, ["<image>a"], "there are 0 images, and \\[1\\] markers"),
])
def test_what_does_not_fit_is_refused(voco, images, text, problem):
    blank = Image.new("RGB", (8, 8))
    given_images = [[blank] * len(own) for own in images] if isinstance(images, list) else [blank] * images
    with pytest.raises(ValueError, match=problem):
        voco.processor(images=given_images or None, text=text)


def test_misuse_is_named(voco):
    with pytest.raises(TypeError, match="no argument videos"):
        voco.processor(text="a", videos=[1])
    with pytest.raises(ValueError, match="pass images, text or both"):
        voco.processor()
    with pytest.raises(ValueError, match="an image must be a path, a web address, a PIL image or an array"):
        voco.processor(images=3, text="a")
    with pytest.raises(ValueError, match=r"num_vocos must be in \[1, 2\], got 3"):
        voco.processor(text="a", num_vocos=3)
    inputs = voco.processor(images=Image.new("RGB", (8, 8)), text="what?")
    with pytest.raises(ValueError, match="4 tokens of images, but there are no pixel_values"):
        voco.model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match=r"must be uint8 \[B, U, 3, H, W\], got torch.float32"):
        voco.model(**{**inputs, "pixel_values": inputs["pixel_values"].float()})
    with pytest.raises(ValueError, match="pass input_ids in place of inputs_embeds"):
        voco.model(input_ids=None, inputs_embeds=inputs["input_ids"].float())
