"""Prepared data sets: what is read is what was written, and a killed preparation goes on to the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tensorflow_datasets")

from vocojax.config import ConfigError
from vocojax.data.config import DataConfig, PartConfig
from vocojax.data.sources import LlavaSource, open_source
from vocojax.data.sources.tfds import Preparation, TfdsSource, write_shard
from vocojax.data.tally import SkippedTooMany

ROOT = Path(__file__).parent.parent.parent
SLOWLY = """
import json, sys, time
from vocojax.data.config import PartConfig
from vocojax.data.sources.tfds import Preparation, shards
example = shards._example
shards._example = lambda *args: (time.sleep(0.05), example(*args))[1]
for task in Preparation((PartConfig(path=sys.argv[1], image_root=sys.argv[2]),), sys.argv[3], "x", 4).tasks():
    shards.write_shard(task)
    print(task.index, flush=True)
"""


@pytest.fixture
def source(llava_data):
    return PartConfig(path=str(llava_data / "records.json"), image_root=str(llava_data / "images"))


def files(directory):
    return {path.name: path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def test_a_prepared_set_gives_the_same_samples(tmp_path, source, llava_data):
    preparation = Preparation((source,), str(tmp_path), "x", 5)
    assert sum(map(write_shard, preparation.tasks())) == 12
    manifest = preparation.finish()
    assert manifest["records"] == 12 and manifest["rejected"] == [] and len(manifest["shards"]) == 5
    read, raw = TfdsSource(tmp_path, "train"), LlavaSource(source.path, source.image_root)
    assert len(read) == 12 and "tensorflow" not in sys.modules
    originals = {raw[i].id: raw[i] for i in range(12)}
    for index in range(12):
        sample = read[index]
        original = originals.pop(sample.id)
        assert sample.threads == original.threads
        assert sample.images == tuple(path.read_bytes() for path in original.images)
    assert len(open_source(DataConfig(source="tfds", path=str(tmp_path)))) == 12
    with pytest.raises(ConfigError, match=r"has the splits \['train'\], not 'test'"):
        open_source(DataConfig(source="tfds", path=str(tmp_path), split="test"))


def test_easy_vqa_is_complete(tmp_path):
    pytest.importorskip("easy_vqa")
    preparation = Preparation((PartConfig("easy_vqa", "validation"),), str(tmp_path), "easy_vqa", 2)
    assert sum(map(write_shard, preparation.tasks())) == 400
    preparation.finish()
    assert sum(len(sample.threads) for sample in map(TfdsSource(tmp_path, "validation").__getitem__, range(400))) > 3000


def test_rejected_records_are_named_and_limited(tmp_path, source):
    records = json.loads(Path(source.path).read_text())
    records[3]["image"], records[7]["conversations"][1]["value"] = "../x", " "
    (tmp_path / "records.json").write_text(json.dumps(records))
    damaged = PartConfig(path=str(tmp_path / "records.json"), image_root=source.image_root)
    preparation = Preparation((damaged,), str(tmp_path / "out"), "x", 2)
    for task in preparation.tasks():
        write_shard(task)
    with pytest.raises(SkippedTooMany, match="2 of 12 records were rejected"):
        preparation.finish()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["rejected_by_reason"] == {"empty answer": 1, "image outside root": 1}
    assert [(r["record"], r["reason"]) for r in manifest["rejected"]] == [(3, "image outside root"),
                                                                          (7, "empty answer")]
    with pytest.raises(ValueError, match="no complete data set"):
        TfdsSource(tmp_path / "out", "train")


def test_a_damaged_or_outdated_shard_is_made_again(tmp_path, source):
    preparation = Preparation((source,), str(tmp_path), "x", 2)
    task = preparation.tasks()[0]
    write_shard(task)
    content, written = task.shard.read_bytes(), task.shard.stat().st_mtime_ns
    write_shard(task)
    assert task.shard.stat().st_mtime_ns == written
    task.shard.write_bytes(content[:-1])
    write_shard(task)
    assert task.shard.read_bytes() == content


def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path, source):
    def run(target, kill_behind=None):
        process = subprocess.Popen([sys.executable, "-c", SLOWLY, source.path, source.image_root, str(target)],
                                   stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                   env={**os.environ, "PYTHONPATH": str(ROOT)})
        for line in process.stdout:
            if int(line) == kill_behind:
                time.sleep(0.08)  # in the middle of the next shard
                process.send_signal(signal.SIGKILL)
                break
        return process.wait()

    for task in Preparation((source,), str(tmp_path / "whole"), "x", 4).tasks():
        write_shard(task)
    assert run(tmp_path / "killed", kill_behind=1) == -signal.SIGKILL
    left = files(tmp_path / "killed")
    assert "x-train.array_record-00001-of-00004" in left and "x-train.array_record-00003-of-00004" not in left
    assert run(tmp_path / "killed") == 0
    for target in ("whole", "killed"):
        Preparation((source,), str(tmp_path / target), "x", 4).finish()
    complete = lambda name: {n: c for n, c in files(tmp_path / name).items() if not n.startswith(".")}
    assert complete("whole") == complete("killed")


@pytest.mark.slow
def test_beam_writes_it_in_several_processes(tmp_path, source):
    pytest.importorskip("apache_beam")
    command = [sys.executable, "launch/prepare_data.py", f"--path={source.path}", f"--image_root={source.image_root}",
               f"--target={tmp_path / 'beam'}", "--name=x", "--shards=4", "--runner=FnApiRunner",
               "--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "12 records in 4 shards, 0 rejected" in done.stdout, done.stderr
    preparation = Preparation((source,), str(tmp_path / "here"), "x", 4)
    for task in preparation.tasks():
        write_shard(task)
    preparation.finish()
    assert files(tmp_path / "beam") == files(tmp_path / "here")
