"""The quickstart's models answer in PyTorch as they do in vocojax: sixty questions of easy-VQA's test split."""

import numpy as np
import pytest

from configs import quickstart
from tests.pretrained.torch.conftest import open_pair
from vocojax import SamplingConfig
from vocojax.data.conversation import Turn
from vocojax.experiments.quickstart import Quickstart
from vocojax.pretrained.conversion import convert

easy_vqa = pytest.importorskip("easy_vqa")


def answers_of_both(run, export):
    """Exports a run and returns PyTorch's and vocojax's answers, and the right ones."""
    convert(run, export, "huggingface", report=lambda line: None)
    pair = open_pair(export)
    paths, (texts, gold, owners) = easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()
    chosen = np.random.default_rng(0).choice(len(texts), 60, replace=False)
    questions, images = [texts[i] for i in chosen], [paths[owners[i]] for i in chosen]
    inputs = pair.processor(images=images, text=["<image>" + question for question in questions])
    written = pair.model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    theirs = [text.strip() for text in pair.processor.batch_decode(written, skip_special_tokens=True)]
    generation = pair.assistant.generate_whole([pair.assistant.load_images([image]) for image in images],
                                               [(Turn("user", question),) for question in questions],
                                               SamplingConfig(max_new_tokens=8))
    return theirs, [text.strip() for text in pair.assistant.texts(generation)], [gold[i] for i in chosen]


@pytest.mark.slow
def test_sixty_questions(tmp_path):
    Quickstart(quickstart.get_config, tmp_path / "runs").run()
    for name in ("voco_1", "upper_bound"):
        theirs, ours, gold = answers_of_both(tmp_path / "runs" / "seed_0" / name, tmp_path / name)
        assert theirs == ours
        assert sum(answer == right for answer, right in zip(theirs, gold, strict=True)) > 50
