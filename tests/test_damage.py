"""A flipped bit at any place of any file that the project writes is noticed, and named; nothing is silently different.

Where a file can be made again from what it was made of, it is. The default suite tries a few places of each kind of
directory; the slow test tries many.
"""

import dataclasses
import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.inference.test_store import IMAGES, MODEL, entry
from vocojax.config import config_to_dict
from vocojax.data.config import PartConfig
from vocojax.data.sources.columnar import ColumnarRecords
from vocojax.errors import VocojaxError
from vocojax.inference.caches.store import Store
from vocojax.pretrained.export import export
from vocojax.pretrained.source import open_source
from vocojax.training.stage import train

# Files of a run from which no model is read.
OTHERS = {"optimizer", "metrics.jsonl", "goodput.json", "versions.json", "parameters.txt", "events"}


def model_of(directory: Path) -> str:
    """Everything that a model on disk is made of, as a digest."""
    source = open_source(directory)
    card = source.card
    whole = hashlib.sha256(json.dumps([config_to_dict(card.model), card.template, card.fit, card.visibility,
                                       card.tokenizer.huggingface.backend_tokenizer.to_str(),
                                       sorted(card.tokenizer.huggingface.special_tokens_map.items())]).encode())
    for name in sorted(source.weights.shapes):
        whole.update(name.encode() + np.ascontiguousarray(source.weights.read(name)).tobytes())
    return whole.hexdigest()


def caches_of(directory: Path) -> list[list[float]]:
    """The entries of a store."""
    store = Store(directory)
    return [np.asarray(store.get(image, MODEL, 2).k_LUNGD).tolist() for image in IMAGES[:2]]


def records_of(directory: Path) -> list[dict]:
    """The records of a JSON."""
    records = ColumnarRecords(directory / "x.json")
    return [records[index] for index in range(len(records))]


def samples_of(directory: Path) -> list:
    """The samples of a prepared data set."""
    from vocojax.data.sources.tfds import TfdsSource

    source = TfdsSource(directory, "train")
    return [source[index] for index in range(len(source))]


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_config, words, llava_data):
    """Makes a directory of each kind, once: kind -> (directory, what is read from it)."""
    root = tmp_path_factory.mktemp("damage")
    made: dict[str, Path] = {}

    def make(kind: str, stage) -> tuple[Path, object]:
        directory = root / kind
        if kind in made:
            return directory, made[kind]
        if kind == "run":
            train(dataclasses.replace(stage, steps=1), directory)
        elif kind in ("orbax", "huggingface", "llava"):
            export(open_source(make("run", stage)[0]), directory, kind)
        elif kind == "store":
            for image in IMAGES[:2]:
                Store(directory).put(entry(image))
        elif kind == "arrow":
            directory.mkdir()
            shutil.copy(llava_data / "records.json", directory / "x.json")
        else:
            pytest.importorskip("tensorflow_datasets")
            from vocojax.data.sources.tfds import Preparation, write_shard

            part = PartConfig(path=str(llava_data / "records.json"), image_root=str(llava_data / "images"))
            preparation = Preparation((part,), str(directory), "x", 2)
            for task in preparation.tasks():
                write_shard(task)
            preparation.finish()
        made[kind] = READ[kind](directory)
        return directory, made[kind]

    return make


READ = {"run": model_of, "orbax": model_of, "huggingface": model_of, "llava": model_of, "store": caches_of,
        "arrow": records_of, "prepared": samples_of}


def damage(kind: str, directory: Path, whole: object, places: int, seed: int) -> dict[str, int]:
    """Flips single bits at random places of random files, and reads the directory after each.

    Returns:
      How often what was read was the same, and how often it was refused.
    """
    chance, outcomes = random.Random(seed), {"same": 0, "refused": 0}
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.stat().st_size
             and path.name != "x.json" and not set(path.relative_to(directory).parts) & OTHERS]
    contents = {path: path.read_bytes() for path in files}
    for _ in range(places):
        file = chance.choice(files)
        content = bytearray(contents[file])
        place, bit = chance.randrange(len(content)), chance.randrange(8)
        content[place] ^= 1 << bit
        file.write_bytes(content)
        where = f"{kind}: bit {bit} of byte {place} of {file.relative_to(directory)}"
        try:
            assert READ[kind](directory) == whole, f"{where}: silently different"
            outcomes["same"] += 1
        except VocojaxError as error:
            assert str(directory) in str(error) and "\n" not in str(error), f"{where}: {error}"
            outcomes["refused"] += 1
        except Exception as error:
            if isinstance(error, AssertionError):
                raise
            raise AssertionError(f"{where}: {type(error).__name__}: {str(error)[:300]}") from error
        for path in files:
            if not path.exists() or path == file:
                path.parent.mkdir(exist_ok=True, parents=True)
                path.write_bytes(contents[path])
    return outcomes


@pytest.mark.parametrize("kind", READ)
def test_a_flipped_bit_is_never_silent(kind, written, stage):
    directory, whole = written(kind, stage)
    outcomes = damage(kind, directory, whole, 20, seed=0)
    assert outcomes["same"] == 20 if kind == "arrow" else outcomes["refused"] >= 1, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("kind", READ)
def test_a_thousand_flipped_bits(kind, written, stage):
    directory, whole = written(kind, stage)
    print(kind, damage(kind, directory, whole, 1000, seed=1))
