"""Prepared data sets: what is read is what was written, and a killed preparation goes on to the same bytes."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tensorflow_datasets")

from tests.data.test_videos import write_video
from vocojax.config import ConfigError
from vocojax.data.config import DataConfig, PartConfig
from vocojax.data.packing import row_shape
from vocojax.data.prepared import PreparedSource
from vocojax.data.sources import LlavaSource, open_source
from vocojax.data.sources.tfds import Preparation, StoredFrames, TfdsSource, shards, write_shard
from vocojax.data.tally import SkippedTooMany
from vocojax.errors import ConvertError, InputError
from vocojax.liveness import this_process

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


def test_videos_are_decoded_once_to_the_frames_that_training_reads(tmp_path, tiny_config, words):
    """Of a file and a list; what a stage makes of them is what it makes of the files, as far as JPEG keeps it."""
    write_video(tmp_path / "v.mp4", frames=100)
    for number in range(4):
        Image.new("RGB", (64, 48), (60 * number,) * 3).save(tmp_path / f"{number}.png")
    Image.new("RGB", (64, 48), (200,) * 3).save(tmp_path / "i.png")
    turns = [{"from": "human", "value": "<image><video><video>what?"}, {"from": "gpt", "value": "x"}]
    record = {"image": "i.png", "video": "v.mp4", "frames": [f"{number}.png" for number in range(4)]}
    asked = [{"from": "human", "value": "what?"}, turns[1]]
    records = [{**record, "conversations": turns}, {"image": "i.png", "conversations": asked},
               {"video": "none.mp4", "conversations": asked}]
    (tmp_path / "x.json").write_text(json.dumps(records))
    part = PartConfig(path=str(tmp_path / "x.json"), image_root=str(tmp_path))
    stored = StoredFrames(frames=5, sampling="segments", jpeg_quality=90)
    manifest = prepare(part, tmp_path / "out", stored=stored, max_skipped_share=1.0)
    assert manifest["video_frames"] == {"frames": 5, "sampling": "segments", "jpeg_quality": 90}
    assert manifest["rejected_by_reason"] == {"missing video": 1}

    prepared = TfdsSource(tmp_path / "out", "train")
    both = next(sample for sample in map(prepared.__getitem__, range(2)) if sample.videos)
    assert [len(frames) for frames in both.videos] == [5, 4]
    assert both.videos[1] == tuple((tmp_path / f"{number}.png").read_bytes() for number in range(4))

    raw = DataConfig(path=part.path, image_root=part.image_root, template="short", row_length=512, images_per_row=16,
                     frames=5, frame_sampling="segments")
    here = dataclasses.replace(raw, source="tfds", path=str(tmp_path / "out"))
    units = {}
    for name, data in (("raw", raw), ("prepared", here)):
        source = PreparedSource(open_source(data), tiny_config, data, words, row_shape(data, 32, 4, "voco"))
        loaded = [source.load(source.lay_out(record)).images for record in range(2)]
        units[name] = np.array(max(loaded, key=len), int)
    assert units["raw"].shape == (10, 32, 32, 3) and np.abs(units["raw"] - units["prepared"]).max() <= 3
    with pytest.raises(ConfigError, match=r"jpeg_quality must be in \[1, 100\], got 0"):
        StoredFrames(jpeg_quality=0)


def test_a_data_set_of_version_0_1_is_read(tmp_path, source, monkeypatch):
    """Its records have no frames."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    features = tfds.features.FeaturesDict({"id": text, "images": tfds.features.Sequence(text), "threads": text})
    monkeypatch.setattr(shards, "features", lambda: features)
    monkeypatch.setattr(shards, "_serializer", shards._serializer.__wrapped__)
    monkeypatch.setattr(features, "encode_example", lambda record: type(features).encode_example(
        features, {key: record[key] for key in ("id", "images", "threads")}))
    prepare(source, tmp_path)
    assert "frames" not in (tmp_path / "features.json").read_text()
    sample = TfdsSource(tmp_path, "train")[0]
    assert len(sample.images) == 1 and sample.videos == ()


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"source 'tfds' needs pip install -e '\.\[tfds\]'"):
        open_source(DataConfig(source="tfds", path=str(tmp_path)))


def test_reading_needs_no_writer():
    code = """if True:
        import grain, sys
        sys.modules["array_record.python.array_record_module"] = None
        import vocojax.data.sources.tfds"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


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


def prepare(source, target, **options):
    preparation = Preparation((source,), str(target), "x", 2, **options)
    for task in preparation.tasks():
        write_shard(task)
    return preparation.finish()


def test_a_data_set_of_which_some_shards_were_replaced_does_not_open(tmp_path, source):
    """The source changes, and the second preparation is killed behind its first shard."""
    records = json.loads(Path(source.path).read_text())
    copy = dataclasses.replace(source, path=str(tmp_path / "records.json"))
    Path(copy.path).write_text(json.dumps(records))
    prepare(copy, tmp_path / "out")
    Path(copy.path).write_text(json.dumps(records[:8]))
    write_shard(Preparation((copy,), str(tmp_path / "out"), "x", 2).tasks()[0])
    with pytest.raises(ValueError, match="no complete data set"):
        TfdsSource(tmp_path / "out", "train")
    prepare(copy, tmp_path / "out")
    assert len(TfdsSource(tmp_path / "out", "train")) == 8


def test_records_whose_images_were_repaired_are_taken_up(tmp_path, source):
    shutil.copytree(source.image_root, tmp_path / "images")
    copy = dataclasses.replace(source, image_root=str(tmp_path / "images"))
    image = next(path for path in sorted((tmp_path / "images").iterdir()) if path.name in Path(copy.path).read_text())
    content = image.read_bytes()
    image.write_bytes(content[:50])
    with pytest.raises(SkippedTooMany, match="repair their files and run the same command again"):
        prepare(copy, tmp_path / "out")
    image.write_bytes(content)
    assert prepare(copy, tmp_path / "out")["rejected"] == []
    assert len(TfdsSource(tmp_path / "out", "train")) == 12


def test_partial_files_of_killed_processes_are_removed(tmp_path, source):
    (tmp_path / "shards").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    writer = f"{this_process().machine}{dead.pid:08x}{'0' * 16}"
    for left in (".x-train.array_record-00000-of-00002", "shards/.train-00000-of-00002.json"):
        (tmp_path / f"{left}.{writer}.partial").write_bytes(b"left")
    prepare(source, tmp_path)
    assert not [name for name in files(tmp_path) if name.startswith(".")]


def test_nothing_is_left_of_a_shard_that_failed(tmp_path, source, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_example", full)
    with pytest.raises(OSError, match="No space"):
        prepare(source, tmp_path)
    assert files(tmp_path) == {}


def test_what_can_not_be_prepared_is_refused(tmp_path, source):
    boxes = PartConfig("shikra_rec", path="x.jsonl")
    with pytest.raises(ConfigError, match=r"source can't be 'shikra_rec', whose boxes depend on data\.fit"):
        Preparation((boxes,), str(tmp_path), "x")
    with pytest.raises(ConfigError, match=r"target must be a directory that all workers share, got 'gs://b/x'"):
        Preparation((source,), "gs://b/x", "x")


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
               f"--target={tmp_path / 'beam'}", "--name=x", "--shards=4", "--", "--runner=FnApiRunner",
               "--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "12 records in 4 shards, 0 rejected" in done.stdout, done.stderr
    preparation = Preparation((source,), str(tmp_path / "here"), "x", 4)
    for task in preparation.tasks():
        write_shard(task)
    preparation.finish()
    assert files(tmp_path / "beam") == files(tmp_path / "here")


def test_a_data_set_that_names_other_modules_is_refused_before_they_are_imported(tmp_path, source):
    prepare(source, tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    path = tmp_path / "features.json"
    text = path.read_text()
    (tmp_path / "harmful.py").write_text("raise SystemExit")
    path.write_text(text.replace("tensorflow_datasets.core.features.text_feature.Text", "harmful.Text", 1))
    with pytest.raises(InputError, match=rf"^{path}: is not what launch/prepare_data.py writes; run it again"):
        TfdsSource(tmp_path, "train")
    path.write_text(text)
    assert len(TfdsSource(tmp_path, "train")) == 12 and "harmful" not in sys.modules


def test_damage_of_a_prepared_set_is_named_and_mended_by_the_same_command(tmp_path, source):
    prepare(source, tmp_path)
    whole = files(tmp_path)
    for name in ("dataset_info.json", "features.json", "manifest.json", "x-train.array_record-00001-of-00002",
                 "shards/train-00000-of-00002.json"):
        content = bytearray((tmp_path / name).read_bytes())
        content[content.index(b"6" if b"6" in content[:500] else content[200:201])] ^= 1
        (tmp_path / name).write_bytes(content)
        if not name.startswith("shards/"):
            with pytest.raises((InputError, ConvertError), match=rf"^{tmp_path}.*again"):
                [TfdsSource(tmp_path, "train")[index] for index in range(12)]
        prepare(source, tmp_path)
        assert files(tmp_path) == whole
