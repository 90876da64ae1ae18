"""Exports to the original layout open in the original code: tokenizer, weights and tower are where it looks."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel

from tests.helpers import checkpoints
from vocojax.config import VisionConfig
from vocojax.data.images import prepare
from vocojax.errors import ConvertError
from vocojax.models.voco import Rows
from vocojax.pretrained.conversion import convert
from vocojax.pretrained.export import export
from vocojax.pretrained.loading import load_model
from vocojax.pretrained.source import Source, open_source, parameter_shapes
from vocojax.weights import ParametersInMemory

SENTENCES = ["A chat between a curious user and an assistant. USER: what color is the bus? ASSISTANT: red"] * 50
TEXT = "\n<voco><voco>\nA chat between a curious user and an assistant. USER: what  color is the bus? ASSISTANT:"
OLD = ("transformers==4.37.2", "tokenizers<0.19", "numpy<2", "sentencepiece", "protobuf", "pillow")


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A checkpoint as the released code saves it, with LLaMA's kind of tokenizer, and as a run; the run's directory."""
    root = tmp_path_factory.mktemp("released")
    model = root / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(model), vocab_size=330, model_type="bpe", unk_id=0,
        bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2)
    rows = sentencepiece.SentencePieceProcessor(model_file=f"{model}.model").get_piece_size()
    source = root / "source"
    checkpoints.save_original(source, checkpoints.original_tensors(rows=rows + 1), image_aspect_ratio="pad")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    model.with_suffix(".model").rename(source / "tokenizer.model")
    (source / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>", "legacy": False, "add_bos_token": True, "model_max_length": 2048}))
    convert(source, root / "run", "orbax", report=lambda _: None)
    return root / "run"


@pytest.fixture(scope="module")
def exported(released) -> Path:
    convert(released, released.parent / "out", "llava", verify=True, report=lambda _: None)
    return released.parent / "out"


def test_the_run_s_vocabulary_comes_back(released, exported):
    """The same config is the same fingerprint, so both read the same caches."""
    run, out = open_source(released), open_source(exported)
    assert run.config == out.config and out.config.decoder.vocab_padding > 0
    written = json.loads((exported / "config.json").read_text())
    assert written["vocab_size"] == len(out.card.tokenizer) == out.config.voco.token_id + 1


def test_tokenizer_files_travel(released, exported):
    for directory in (released / "tokenizer", exported):
        names = {path.name for path in directory.iterdir()}
        assert names >= {"tokenizer.model", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"}
        assert (directory / "tokenizer.model").read_bytes() == (
            released.parent / "source" / "tokenizer.model").read_bytes()
        config = json.loads((directory / "tokenizer_config.json").read_text())
        assert (config["tokenizer_class"], config["legacy"]) == ("LlamaTokenizer", False)


def test_a_tower_of_its_own_is_a_directory(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["mm_vision_tower"] == str(exported / "vision_tower")
    assert (config["image_aspect_ratio"], config["mm_hidden_size"]) == ("pad", 128)
    tower, report = CLIPVisionModel.from_pretrained(config["mm_vision_tower"], output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in checkpoints.clip_tensors().items():
        np.testing.assert_array_equal(tower.state_dict()[name], tensor, err_msg=name)
    assert tower.config.num_attention_heads == 2


def test_a_moved_export_opens_with_its_tower_s_new_place(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "moved")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config["mm_vision_tower"] = str(tmp_path / "moved" / "vision_tower")
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    assert open_source(tmp_path / "moved").config == open_source(exported).config


def test_a_changed_entry_of_the_config_is_refused(exported, tmp_path):
    """No sum protects this file, which must be edited after a move."""
    shutil.copytree(exported, tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 90000.0}))
    with pytest.raises(ConvertError, match=r"was changed after it was written: decoder\.rope_theta differ"):
        open_source(tmp_path / "changed")


def test_a_tower_with_the_config_of_openai_s_is_written_too(released, tmp_path, monkeypatch):
    """It may be trained, and the original code would load OpenAI's in its place."""
    source = open_source(released)
    clip = dataclasses.replace(source.config, vision=VisionConfig())
    shapes = parameter_shapes(clip)
    weights = ParametersInMemory({path: np.zeros(shapes[path], np.float16) for path in shapes})
    written = []
    monkeypatch.setattr("vocojax.pretrained.export._write_tensors", lambda *arguments: written.append(arguments[1]))
    export(Source(dataclasses.replace(source.card, model=clip), weights), tmp_path / "out", "llava")
    assert written[0].name == "vision_tower"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mm_vision_tower"] == str(
        tmp_path / "out" / "vision_tower")


@pytest.mark.parametrize(("fit", "ratio"), [("pad", "pad"), ("crop", "square"), ("square", "square")])
def test_the_image_processor_matches_the_fit(released, tmp_path, fit, ratio):
    source = open_source(released)
    card = dataclasses.replace(source.card, fit=fit)
    export(dataclasses.replace(source, card=card), tmp_path / "out", "llava")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_aspect_ratio"] == ratio
    assert open_source(tmp_path / "out").card.fit == fit
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8))
    if fit == "pad":  # the original code pads before the processor
        square = Image.new("RGB", (56, 56), (122, 116, 104))
        square.paste(image, (0, 8))
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "out" / "vision_tower", do_normalize=False,
                                                   do_rescale=False)
    pixels = processor(square if fit == "pad" else image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(pixels.transpose(1, 2, 0), prepare(image, 28, fit), rtol=0, atol=1)


@pytest.mark.parametrize("fit", ["pad_white", "anyres"])
def test_fits_that_the_original_code_does_not_have(released, tmp_path, fit):
    source = open_source(released)
    card = dataclasses.replace(source.card, fit=fit)
    with pytest.raises(ConvertError, match=rf"'llava' does not support the fit '{fit}'.* use the layout 'huggingface'"):
        export(dataclasses.replace(source, card=card), tmp_path / "out", "llava")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_original_code_opens_an_export(exported, tmp_path):
    """transformers 4.37.2 with its slow tokenizer, in an environment of its own that shares torch with this one."""
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", str(site), *OLD], check=True)
    square = np.random.default_rng(1).integers(0, 256, (28, 28, 3)).astype(np.uint8)
    np.save(tmp_path / "pixels.npy", square)
    loader = Path(__file__).parents[1] / "helpers" / "original_loader.py"
    done = subprocess.run(
        [sys.executable, str(loader), str(exported), str(tmp_path / "pixels.npy"), TEXT, str(tmp_path / "out.npz")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(site), "USE_FLAX": "0", "USE_TF": "0"}, capture_output=True,
        text=True)
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "out.npz")
    tokenizer, model = open_source(exported).card.tokenizer, load_model(exported)
    ids = tokenizer.encode(TEXT).ids
    assert theirs["ids"].tolist() == ids and ids.count(tokenizer.voco_id) == 2
    assert theirs["rows"] == theirs["tokens"] == len(tokenizer) == model.config.decoder.num_tokens

    patches = model.config.vision.num_patches
    row = np.array([[tokenizer.bos_id] * (1 + patches) + ids])
    vision = np.full_like(row, -1)
    vision[0, 1 : 1 + patches] = np.arange(patches)
    positions = jnp.arange(row.shape[1])[None]
    rows = Rows(jnp.asarray(row), positions, jnp.zeros_like(positions), jnp.full_like(positions, row.shape[1]),
                jnp.asarray(vision), jnp.asarray(square)[None, None])
    logits = jax.jit(lambda rows: model.decoder.logits(model(rows)[0]))(rows)
    np.testing.assert_allclose(logits[..., : len(tokenizer)], theirs["logits"], rtol=0, atol=1e-4)
