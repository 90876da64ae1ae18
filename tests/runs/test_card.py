"""The card of a model: the same facts from a run, a conversion and every export, and never silently another's."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vocojax.config import ConfigError
from vocojax.errors import ConvertError
from vocojax.inference.assistant import Assistant
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.many import answer_many
from vocojax.inference.requests import Request
from vocojax.pretrained.conversion import convert
from vocojax.pretrained.export import export
from vocojax.pretrained.loading import load_card, save_model
from vocojax.pretrained.source import open_source
from vocojax.runs.card import ModelCard, read_card, read_published
from vocojax.runs.directory import CheckpointError
from vocojax.runs.parameters import load_model
from vocojax.testing import tiny_model
from vocojax.training.stage import train

ROOT = Path(__file__).parents[2]


def facts(card: ModelCard) -> dict[str, object]:
    return {"template": card.template, "fit": card.fit, "visibility": card.visibility,
            "num_vocos": card.model.voco.num_vocos, "positions": card.model.voco.positions,
            "token_id": card.tokenizer.voco_id}


@pytest.fixture(scope="module")
def upper_bound(tiny_config, words, tmp_path_factory):
    """An upper bound in all layouts, as it would be exported after training."""
    root = tmp_path_factory.mktemp("upper_bound")
    config = dataclasses.replace(tiny_config, voco=dataclasses.replace(tiny_config.voco, positions="sequential"))
    model = tiny_model(config)
    card = ModelCard(config, words, template="short", fit="crop", visibility="causal")
    for layout in ("orbax", "huggingface", "llava"):
        save_model(model, card, root / layout, layout)
    return card, root


@pytest.mark.parametrize("layout", ["orbax", "huggingface", "llava"])
def test_every_layout_says_what_the_model_is(upper_bound, layout):
    card, root = upper_bound
    assert facts(load_card(root / layout)) == facts(card) == {
        "template": "short", "fit": "crop", "visibility": "causal", "num_vocos": 2,
        "positions": "sequential", "token_id": card.tokenizer.voco_id}


def test_an_upper_bound_is_never_read_through_the_voco_mask(upper_bound):
    _, root = upper_bound
    for layout in ("orbax", "huggingface"):
        assert Assistant.from_pretrained(root / layout).visibility == "causal"
    lower_bound = Assistant.from_pretrained(root / "orbax", visibility="voco")  # on purpose
    assert lower_bound.visibility == "voco"


def test_a_command_reads_an_upper_bound_with_whole_images(upper_bound, llava_data, tmp_path):
    """`answer` gives what the single pass with the causal mask gives, and puts nothing into the store."""
    _, root = upper_bound
    image, question = llava_data / "images" / "0.png", "what color is the shape?"
    assistant = Assistant.from_pretrained(root / "huggingface")
    sampling = SamplingConfig(max_new_tokens=4)
    (expected,) = answer_many(assistant, [Request(question, (image,), sampling)], way="single pass", progress=None)
    done = subprocess.run(
        [sys.executable, "launch/answer.py", f"--checkpoint={root}/huggingface", f"--store={tmp_path}/store",
         f"--image={image}", f"--question={question}", "--max_new_tokens=4"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.text + "\n" and expected.finish_reason != "error"
    assert not (tmp_path / "store").exists()


def test_a_conversion_carries_the_card_on(upper_bound, tmp_path):
    card, root = upper_bound
    convert(root / "huggingface", tmp_path / "again", "orbax", verify=True, report=lambda _: None)
    assert facts(read_card(tmp_path / "again")) == facts(card)


def test_a_run_has_the_card_of_its_stage(stage, tmp_path):
    train(dataclasses.replace(stage, steps=1, visibility="causal"), tmp_path / "run")
    assert facts(read_card(tmp_path / "run")) == {
        "template": "short", "fit": "pad", "visibility": "causal", "num_vocos": 2,
        "token_id": stage.model.voco.token_id, "positions": "compact"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visibility": "vodo"}, "prompt.visibility must be one of 'voco', 'causal', got 'vodo'"),
        ({"model": {}, "data": {"template": "vicuna"}}, "prompt.template must be one of"),
        ({"model": {"decoder": {"depht": 3}}}, "model.decoder.depht is not a key"),
    ],
)
def test_a_card_that_says_what_cannot_be_is_refused(upper_bound, tmp_path, change, message):
    values = json.loads((upper_bound[1] / "orbax" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/config.json: {message}"):
        read_card(tmp_path)


def test_a_damaged_config_is_named(tmp_path):
    for content in ('{"model":', "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=rf"^{tmp_path}/config\.json: is damaged, .*; copy it from a backup"):
            read_card(tmp_path)


def test_an_unknown_entry_of_an_export_is_refused():
    with pytest.raises(ConfigError, match=r"^prompt\.fitt is not a key.*did you mean 'fit'"):
        read_published({"prompt": {"fitt": "pad"}}, "pad", "voco")
    assert read_published({}, "crop", "causal") == {"template": "vicuna_v1", "fit": "crop", "visibility": "causal"}


def edited(run: Path, name: str, old: str, new: str) -> Path:
    """Replaces a text that a file of the run holds once or more, the first time."""
    text = (run / name).read_text()
    assert old in text
    (run / name).write_text(text.replace(old, new, 1))
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_config, llava_data):
    """A run of one step; the function gives copies of it, with the sums of its files or without, as in version 0.1."""
    root = tmp_path_factory.mktemp("trained")
    copies = iter(range(100))

    def copy(stage, sums: bool) -> Path:
        if not (root / "run").exists():
            train(dataclasses.replace(stage, steps=1), root / "run")
        target = root / f"copy{next(copies)}"
        shutil.copytree(root / "run", target)
        if not sums:
            (target / "SHA256SUMS").unlink()
        return target

    return copy


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize(("name", "old", "new", "key"), [
    ("config.json", '"rope_theta": 10000.0', '"rope_theta": 90000.0', "model.decoder.rope_theta"),
    ("config.json", '"visibility": "voco"', '"visibility": "causal"', "visibility"),
    ("config.json", '"template": "short"', '"templatf": "short"', "data.template"),
    ("config.json", '"fit": "pad"', '"fit": "crop"', "data.fit"),
])
def test_a_runs_config_is_held_against_the_copy_that_its_checkpoint_signs(trained, stage, sums, name, old, new, key):
    run = edited(trained(stage, sums), name, old, new)
    why = r"was changed after it was written \(SHA256SUMS\)" if sums else (
        rf"was changed after the run wrote it \(differing from the newest checkpoint: {key}\); copy it from a backup")
    with pytest.raises(CheckpointError, match=rf"^{run}/config.json: {why}"):
        read_card(run)
    with pytest.raises(CheckpointError, match=rf"^{run}/config.json: {why}"):
        load_model(run)


@pytest.mark.parametrize("sums", [True, False])
def test_a_runs_tokenizer_is_held_against_what_its_checkpoint_signs(trained, stage, sums):
    run = trained(stage, sums)
    for old, new in (('"red"', '"XX"'), ('"blue"', '"red"'), ('"XX"', '"blue"')):
        edited(run, "tokenizer/tokenizer.json", old, new)
    why = r"/tokenizer.json: was changed after it was written \(SHA256SUMS\)" if sums else (
        ": was changed after the run wrote it, its vocabulary is not the checkpoint's")
    with pytest.raises(CheckpointError, match=rf"^{run}/tokenizer{why}"):
        read_card(run)
    read_card(run, stage.data.tokenizer)  # another one on purpose


def test_a_start_makes_a_damaged_config_and_tokenizer_again(trained, stage, caplog):
    run = trained(stage, True)
    good = {name: (run / name).read_bytes() for name in ("config.json", "tokenizer/tokenizer.json", "SHA256SUMS")}
    for name in good:
        (run / name).write_bytes(good[name][:40] + b"\xff" + good[name][41:])
    train(dataclasses.replace(stage, steps=1), run)
    assert {name: (run / name).read_bytes() for name in good} == good
    assert any(re.match(rf"{run}/config.json: is damaged, it is not JSON", message) for message in caplog.messages)


def test_a_conversion_has_checksums(upper_bound, tmp_path):
    _, root = upper_bound
    convert(root / "orbax", tmp_path / "again", "orbax", report=lambda _: None)
    for file in (tmp_path / "again").rglob("*"):
        if file.is_file() and "down" in str(file) and not file.name.startswith("."):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 64
            file.write_bytes(content)
            break
    with pytest.raises(CheckpointError, match=r"again/checkpoints/0/parameters IS DAMAGED: .*decoder/blocks/down/"):
        load_model(tmp_path / "again")


def test_a_tokenizer_with_several_chat_templates_is_converted(upper_bound, tmp_path):
    _, root = upper_bound
    source = open_source(root / "orbax")
    source.card.tokenizer.huggingface.chat_template = {"default": "x", "tool_use": "y"}
    export(source, tmp_path / "run", "orbax")
    listed = {line.split("  ")[1] for line in (tmp_path / "run" / "SHA256SUMS").read_text().splitlines()}
    assert "tokenizer/additional_chat_templates/tool_use.jinja" in listed
    assert read_card(tmp_path / "run").tokenizer.huggingface.chat_template == {"default": "x", "tool_use": "y"}


def test_an_export_has_sums_that_the_usual_command_checks(upper_bound, tmp_path):
    _, root = upper_bound
    shutil.copytree(root / "huggingface", tmp_path / "export")
    done = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path / "export", capture_output=True)
    assert done.returncode == 0, done.stderr
    listed = {line.split("  ")[1] for line in (tmp_path / "export" / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.relative_to(tmp_path / "export").as_posix() for path in (tmp_path / "export").rglob("*")
                      if path.is_file() and path.name not in ("SHA256SUMS", "README.md")}
    shard = tmp_path / "export" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    opened = open_source(tmp_path / "export")
    with pytest.raises(ConvertError, match=rf"^{shard}: was changed after it was written \(SHA256SUMS\); restore it"):
        opened.weights.read("decoder/embedding")
    (tmp_path / "export" / "SHA256SUMS").write_text("not sums")
    with pytest.raises(ConvertError, match=r"SHA256SUMS: is damaged; restore it, or remove it to use the directory"):
        open_source(tmp_path / "export")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_alone_says_who_may_read_an_export(upper_bound, tmp_path, umask):
    _, root = upper_bound
    before = os.umask(umask)
    try:
        for layout in ("huggingface", "orbax"):
            export(open_source(root / "orbax"), tmp_path / layout, layout)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
