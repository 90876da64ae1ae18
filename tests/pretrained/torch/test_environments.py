"""An export answers where there is nothing but torch and transformers, of the lowest to the highest tested version."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pretrained.torch.test_single_pass import QUESTIONS, assert_same_answers
from vocojax.data.conversation import Turn
from vocojax.inference.caches import files
from vocojax.pretrained.torch.environment_voco_llava import HIGHEST, LOWEST

# In 5.12.0 a configuration is a dataclass with required fields; 5.24.0 calls past_key_values cache.
VERSIONS = ("4.53.0", "4.57.1", "5.12.0", "5.23.0", "5.24.0")


def test_the_ends_of_the_range_and_the_locked_version_are_tested():
    lock = (Path(__file__).parents[3] / "requirements.lock").read_text().splitlines()
    locked = next(line.partition("==")[2] for line in lock if line.startswith("transformers=="))
    numbers = [tuple(map(int, version.split(".")[:2])) for version in VERSIONS]
    assert (min(numbers), max(numbers)) == (LOWEST, HIGHEST) and locked in VERSIONS


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_an_environment_with_torch_and_transformers_only(voco, images, tmp_path, version):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    subprocess.run([environment / "bin" / "pip", "install", "--quiet", "torch==2.13.0", f"transformers=={version}",
                    "pillow"], check=True)
    images[1].save(tmp_path / "image.png")
    ours = voco.assistant.compress(tmp_path / "image.png")
    files.save(ours, tmp_path / "ours")
    script = Path(__file__).with_name("in_environment.py")
    done = subprocess.run([environment / "bin" / "python", "-I", script, voco.directory, tmp_path / "image.png",
                           tmp_path / "ours", tmp_path / "theirs"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr and "is tested with" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["transformers"] == version
    question = [(Turn("user", QUESTIONS[0]),)]
    whole = voco.assistant.generate_whole([voco.assistant.load_images([tmp_path / "image.png"])], question)
    after = voco.assistant.generate_behind(ours, question, [[0]])
    for name, expected in (("whole", whole), ("cached", after)):
        is_text = np.isfinite(expected.logits_BV[0])
        np.testing.assert_allclose(np.array(found[name])[: len(is_text)][is_text], expected.logits_BV[0, is_text],
                                   atol=1e-4)
        assert_same_answers([found[f"{name} tokens"][0]], expected.ids_BT[:, :4], voco.assistant.tokenizer.eos_id)
    theirs = files.load(tmp_path / "theirs", voco.assistant.fingerprint)
    np.testing.assert_allclose(theirs.k_LUNGD, ours.k_LUNGD, atol=1e-5)
    assert theirs.image_digests == ours.image_digests
