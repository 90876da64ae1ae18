"""Directories on the Hugging Face hub, in a cache as the hub's own library lays it out. Nothing is downloaded."""

import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects

from tests.helpers import checkpoints
from vocojax.config import ConfigError
from vocojax.data.tokenizer import Tokenizer
from vocojax.errors import ConvertError, InputError
from vocojax.hub import _downloaded, cached_copy, local_copy
from vocojax.inference.assistant import Assistant
from vocojax.pretrained.conversion import convert
from vocojax.pretrained.loading import load_card
from vocojax.pretrained.source import open_source
from vocojax.training.stage import train

COMMITS = {"main": "1" * 40, "v2": "2" * 40}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of a repository with two revisions, and no network."""
    home = tmp_path / "hub"
    for revision, commit in COMMITS.items():
        repository = home / "models--org--a.llava"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        checkpoints.save_original(repository / "snapshots" / commit, checkpoints.original_tensors())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _downloaded.cache_clear()
    yield home / "models--org--a.llava" / "snapshots"
    _downloaded.cache_clear()


def test_a_name_becomes_the_directory_of_its_revision(cache):
    assert local_copy("hf://org/a.llava") == str(cache / COMMITS["main"])
    assert local_copy("hf://org/a.llava@v2/") == str(cache / COMMITS["v2"])
    assert local_copy("hf://org/a.llava@v2/config.json") == str(cache / COMMITS["v2"] / "config.json")
    assert local_copy("runs/voco") == "runs/voco"


def test_wherever_a_directory_is_asked_for(cache, tmp_path):
    name = "hf://org/a.llava@v2"
    expected = open_source(cache / COMMITS["v2"])
    assert load_card(name).model == expected.card.model == Assistant.from_pretrained(name).model.config
    assert Tokenizer.from_directory(name).vocabulary_digest == expected.card.tokenizer.vocabulary_digest
    convert(name, tmp_path / "run", "orbax", tokenizer="hf://org/a.llava", report=lambda _: None)
    for path in expected.weights.shapes:
        np.testing.assert_array_equal(open_source(tmp_path / "run").weights.read(path), expected.weights.read(path))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("hf://org/absent", "is not in the hub's cache, and the hub can't be reached"),
        ("hf://org/a.llava@absent", "is not in the hub's cache, and the hub can't be reached"),
        ("hf://org", "is no name on the hub; write hf://org/name"),
        ("hf://org/a..b", "is no name on the hub"),
        ("hf://org/a.llava/absent.bin", "the repository has no absent.bin"),
        ("hf://org/a.llava/../../x", "is no name on the hub"),
    ],
)
def test_a_problem_is_one_line_that_names_it(cache, name, problem):
    with pytest.raises(InputError) as error:
        local_copy(name)
    assert name in str(error.value) and problem in str(error.value) and "\n" not in str(error.value)


def test_the_hub_is_only_read(cache, stage, tmp_path):
    with pytest.raises(ConfigError, match="workdir can't be on the hub, which is only read, got hf://org/run"):
        train(stage, "hf://org/run")
    with pytest.raises(ConvertError, match="hf://org/new: the hub is only read; write to a local directory"):
        convert("hf://org/a.llava", "hf://org/new", "llava", report=lambda _: None)


def test_an_adapters_base_may_be_named_by_its_repository(cache):
    """As PEFT names it; then it is taken from the cache, and never downloaded."""
    assert cached_copy("org/a.llava") == str(cache / COMMITS["main"])
    assert cached_copy("org/a.llava", "v2") == str(cache / COMMITS["v2"])
    assert cached_copy("org/absent") is None and cached_copy("no repository") is None


@pytest.mark.parametrize(("name", "others"), [
    ("hf://org/llama", []),
    ("hf://org/llama/original", ["original/consolidated.00.pth", "original/params.json"]),  # what is named is wanted
])
def test_the_same_weights_again_are_not_downloaded(tmp_path, monkeypatch, name, others):
    files = ["config.json", "model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth",
             "original/params.json", "consolidated.safetensors", "eva_vit_g.pth"]
    (tmp_path / "original").mkdir()
    taken = []

    def snapshot(repo, revision, ignore_patterns):
        taken.extend(filter_repo_objects(files, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    _downloaded.cache_clear()
    local_copy(name)
    _downloaded.cache_clear()
    assert taken == ["config.json", "model.safetensors", *others, "eva_vit_g.pth"]
