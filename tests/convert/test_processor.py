"""The processor of a directory: what it makes of an image and a question, and that the model takes it."""

import jax
import numpy as np
from PIL import Image

from tests.helpers import checkpoints
from vocojax.data.conversation import Turn
from vocojax.inference.assistant import Assistant
from vocojax.inference.prompts import whole_rows
from vocojax.layout import Role, UnitShape
from vocojax.pretrained.conversion import convert
from vocojax.pretrained.loading import load_model
from vocojax.pretrained.processor import Processor

W = checkpoints.WORDS


def test_processor_and_model_of_one_directory(tmp_path):
    checkpoints.save_huggingface(tmp_path / "source", added=("<image>", "<voco>"))
    processor = Processor.from_pretrained(tmp_path / "source", num_vocos=2)
    assert processor.image_size == 28 and processor.unit == UnitShape(16, 2) and processor.template.name == "vicuna_v1"
    image = Image.new("RGB", (40, 20), "red")
    item = processor([image], "w1 w2")
    # No newline is in this vocabulary of words: BOS, 16 vision tokens, two VoCo tokens, and the text.
    assert item.layout.roles[:20].tolist() == [Role.BOS] + [Role.VISION] * 16 + [Role.VOCO] * 2 + [Role.TEXT]
    assert item.layout.ids[17:19].tolist() == [W + 1, W + 1]
    assert item.layout.ids[-3:].tolist() == [5, 6, 3]  # w1 w2 ASSISTANT:
    assert item.images[0].shape == (28, 28, 3) and item.images[0].dtype == np.uint8
    assert item.images[0][14, 14].tolist() == [255, 0, 0] and item.images[0][0, 0].tolist() == [122, 116, 104]
    answered = processor([image], (Turn("user", "w1"), Turn("assistant", "w2")))
    assert answered.layout.labels[answered.layout.labels >= 0].tolist() == [6, 2]  # the answer and </s>

    model = load_model(tmp_path / "source", num_vocos=2)
    rows = whole_rows([item.layout], [list(item.images)], model.config, "voco", len(item.layout))
    hidden = jax.jit(lambda rows: model(rows)[0])(rows)
    assert hidden.shape == (1, len(item.layout), 32) and np.isfinite(np.asarray(hidden)).all()


def test_assistant_of_a_converted_directory(tmp_path):
    """A conversion to Orbax is ready to answer, as a trained run is."""
    checkpoints.save_huggingface(tmp_path / "source", added=("<image>", "<voco>"))
    convert(tmp_path / "source", tmp_path / "run", "orbax", num_vocos=3, report=lambda _: None)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "photo.png")
    assistant = Assistant.from_run(tmp_path / "run")
    cache = assistant.compress([tmp_path / "photo.png"])
    assert cache.tokens_per_unit == 3
    assert isinstance(assistant.read(cache, ["w1 w2"])[0], str)
    assert Processor.from_pretrained(tmp_path / "run").unit == UnitShape(16, 3)
