"""A tiny assistant with five images and their cache."""

import numpy as np
import pytest

from vocojax.data.conversation import template
from vocojax.inference.assistant import Assistant


@pytest.fixture(scope="session")
def assistant(tiny_model, words) -> Assistant:
    return Assistant(tiny_model, words, template("short"))


@pytest.fixture(scope="session")
def images():
    return list(np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def cache(assistant, images):
    return assistant.compress(images)
