"""The sources of an export: what they need, what they say of themselves, and that reading them again runs nothing."""

import ast
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, LlavaProcessor

from vocojax.errors import ConvertError
from vocojax.pretrained import pytorch
from vocojax.pretrained.loading import load_card
from vocojax.pretrained.torch.environment_voco_llava import HIGHEST, LOWEST, check_version

ROOT = Path(__file__).parents[3]
PACKAGES = {"torch", "transformers", "numpy", "PIL", "safetensors"}  # transformers needs the last three
SOURCES = sorted(pytorch.SOURCES.glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_sources_need_torch_and_transformers_only(path):
    """And each imports all that its own imports need: transformers 4 copies no more than that."""
    near, far = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            near.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            far.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            far |= {alias.name.split(".")[0] for alias in node.names}
    assert far <= PACKAGES | sys.stdlib_module_names
    for name in near:
        assert set(re.findall(r"^from \.(\w+)", (pytorch.SOURCES / f"{name}.py").read_text(), re.MULTILINE)) <= near
    assert len(path.read_text().splitlines()) < 400


def test_the_package_never_imports_them():
    for path in pytorch.SOURCES.parent.parent.rglob("*.py"):
        if path.parent != pytorch.SOURCES:
            assert not re.search(r"(import|from) vocojax\.pretrained\.torch\b", path.read_text()), path


def test_an_export_is_read_again_without_running_them(voco, tmp_path):
    card = load_card(voco.directory)
    assert card.model == voco.assistant.model.config and card.visibility == "voco"
    config = json.loads((voco.directory / "config.json").read_text())
    for file in voco.directory.iterdir():
        if file.name != "SHA256SUMS":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for source in SOURCES:
        (tmp_path / source.name).write_text("raise SystemExit('executed')")
    assert load_card(tmp_path).model == card.model
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "other.Config"}}))
    with pytest.raises(ConvertError, match="auto_map"):
        load_card(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocojax": {"model": {}}}))
    with pytest.raises(ConvertError, match="the entry 'vocojax' has no vocabulary"):
        load_card(tmp_path)


def test_versions_outside_the_tested_range_are_named(monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(logging.getLogger("transformers"), "callHandlers",
                        lambda record: seen.append(record.getMessage()))
    assert [check_version(version) for version in ("4.53.0", "5.0.0rc1", "5.24.3", "5.24.0.dev0")] == [
        (4, 53), (5, 0), (5, 24), (5, 24)]
    assert not seen
    with pytest.raises(ImportError, match=re.escape(
            "this model's code is tested with transformers 4.53 to 5.24, and can't run with 4.52.4, which is older: "
            "pip install 'transformers>=4.53,<5.25'")):
        check_version("4.52.4")
    assert [check_version("5.25.1"), check_version("5.25.1"), check_version("6.0.0")] == [(5, 25), (5, 25), (6, 0)]
    assert seen == [
        f"this model's code is tested with transformers 4.53 to 5.24; {version} is newer. If it fails: "
        "pip install 'transformers>=4.53,<5.25'" for version in ("5.25.1", "6.0.0")]


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs/pytorch.md", pytorch.SOURCES / "README.md",
                                  pytorch.SOURCES / "ADAPTER.md"], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_users_are_told_to_install_a_tested_version(path):
    (low, lowest), (high, highest) = LOWEST, HIGHEST
    installs = re.findall(r"pip install torch .*", path.read_text())
    assert len(installs) == 1 and f"'transformers>={low}.{lowest},<{high}.{highest + 1}'" in installs[0]


@pytest.mark.parametrize("kind", ["voco", "causal"])
def test_the_readme_s_code_runs(kind, tmp_path, monkeypatch, capsys, request):
    directory = request.getfixturevalue(kind).directory
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), (200, 30, 30)).save("photo.png")
    text = (directory / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == {"voco": 2, "causal": 1}[kind] and "$" not in text
    assert "has 4 vision tokens and 2 VoCo tokens, and is" in text
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("this directory", str(directory)).replace("max_new_tokens=64", "max_new_tokens=2"), names)
    assert capsys.readouterr().out.endswith("\n") and (tmp_path / "photo.safetensors").exists() == (kind == "voco")


def test_what_a_plain_llava_is_good_for(causal, voco):
    """With the README's prompt, transformers' own class gives an upper bound's logits, and not a VoCo model's."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for pair, is_right in ((causal, True), (voco, False)):
        prompt = re.search(r"^    (<s>.*)$", (pair.directory / "README.md").read_text(), re.MULTILINE)[1]
        text = "USER: what color is the shape? ASSISTANT:"
        plain = LlavaProcessor.from_pretrained(pair.directory)(
            text=prompt.replace("\\n", "\n") + text, images=image, return_tensors="pt", add_special_tokens=False)
        inputs = pair.processor(text=text, images=image)
        assert torch.equal(plain["input_ids"], inputs["input_ids"])
        model = LlavaForConditionalGeneration.from_pretrained(pair.directory)
        assert type(AutoModelForImageTextToText.from_pretrained(pair.directory)) is LlavaForConditionalGeneration
        with torch.no_grad():
            off = (model(**plain).logits - pair.model(**inputs).logits)[0, -1, : pair.model.config.num_tokens]
        assert (off.abs().max() < 1e-4) == is_right


def test_what_is_saved_again_is_loaded_again(voco, tmp_path):
    voco.model.save_pretrained(tmp_path / "saved")
    voco.processor.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again.fingerprint() == voco.model.fingerprint()
    assert load_card(tmp_path / "saved").model == voco.assistant.model.config
