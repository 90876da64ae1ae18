"""Writes any source as a TFDS directory of array_record shards.

    DIRECTORY/NAME-SPLIT.array_record-00000-of-00016   a shard; images stay encoded as they were, videos are decoded to
                                                       some of their frames, each a JPEG
    DIRECTORY/shards/SPLIT-00000-of-00016.json         its counts, checksum and rejected records
    DIRECTORY/manifest.json                            those of all shards
    DIRECTORY/dataset_info.json, features.json         TFDS's metadata, written last
    DIRECTORY/SHA256SUMS                               sums of the metadata; shards have checksums of their own

A shard depends only on its records and appears only when it is complete. So the writing may be killed and started
again: complete shards are kept, and the result is the same to the byte. A shard that lacks a record because of a bad
image is written again, since the image may have been repaired. While a shard is replaced there is no
`dataset_info.json`: a data set opens only when it is complete.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from vocojax.config import ConfigError, require, require_positive
from vocojax.data.config import DataConfig, PartConfig
from vocojax.data.frame_choice import Sampling
from vocojax.data.images import ImageError, decode, read
from vocojax.data.sources import open_source
from vocojax.data.sources.base import Source
from vocojax.data.sources.columnar import file_digest
from vocojax.data.sources.tfds.features import features
from vocojax.data.tally import SkippedTooMany
from vocojax.data.videos import FrameSource, plan_frames, read_plan
from vocojax.errors import InputError
from vocojax.files import new_file, parse_json, remove_abandoned, write_atomically
from vocojax.layout import LayoutError
from vocojax.sums import write_sums

VERSION = 3


@dataclass(frozen=True)
class StoredFrames:
    """Which frames of a video are stored, and how.

    Attributes:
      frames: the most frames per video.
      sampling: which frames, see `frame_choice.choose_frames`.
      jpeg_quality: of the frames of video files, from 1 to 100; the frames of a directory or list stay as they were.

    Raises:
      ConfigError: a value is out of its range.
    """

    frames: int = 8
    sampling: Sampling = "uniform"
    jpeg_quality: int = 95

    def __post_init__(self) -> None:
        require_positive(self, "frames")
        require(self.sampling in get_args(Sampling), "frame_sampling", f"must be one of {list(get_args(Sampling))}",
                self.sampling)
        require(1 <= self.jpeg_quality <= 100, "jpeg_quality", "must be in [1, 100]", self.jpeg_quality)


@dataclass(frozen=True)
class ShardTask:
    """One shard: every `count`-th record of a source from `index` on.

    Attributes:
      source: the source.
      directory: directory of the data set.
      name: name of the data set.
      index: number of the shard, from 0.
      count: number of shards of the split.
      stored: which frames of videos are stored.
    """

    source: PartConfig
    directory: str
    name: str
    index: int
    count: int
    stored: StoredFrames = StoredFrames()

    @property
    def shard(self) -> Path:
        """The file with the records."""
        suffix = f"{self.index:05d}-of-{self.count:05d}"
        return Path(self.directory) / f"{self.name}-{self.source.split}.array_record-{suffix}"

    @property
    def part(self) -> Path:
        """The file with the counts."""
        return Path(self.directory) / "shards" / f"{self.source.split}-{self.index:05d}-of-{self.count:05d}.json"

    @property
    def info(self) -> Path:
        """The file that exists when the data set is complete."""
        return Path(self.directory) / "dataset_info.json"


@dataclass(frozen=True)
class Preparation:
    """A data set to be written.

    Attributes:
      sources: one source per split.
      directory: where to write it; all workers share it.
      name: name of the data set.
      shards: number of shards per split.
      max_skipped_share: the share of records that may be rejected, from 0 to 1.
      stored: which frames of videos are stored.

    Raises:
      ConfigError: two sources have the same split, there is no source or no shard, the directory is a URL, or a source
        has boxes, whose text depends on the `data.fit` of the stage that reads it.
    """

    sources: tuple[PartConfig, ...]
    directory: str
    name: str
    shards: int = 16
    max_skipped_share: float = 0.01
    stored: StoredFrames = StoredFrames()

    def __post_init__(self) -> None:
        splits = [source.split for source in self.sources]
        if len(set(splits)) < len(splits) or not splits:
            raise ConfigError("sources", f"must have one source for each split, got {splits}")
        if self.shards < 1:
            raise ConfigError("shards", f"must be >= 1, got {self.shards}")
        if "://" in self.directory:
            raise ConfigError("target", f"must be a directory that all workers share, got {self.directory!r}: mount "
                              "the bucket, or copy the finished data set there")
        for source in self.sources:
            if source.source.startswith("shikra"):
                raise ConfigError("source", f"can't be {source.source!r}, whose boxes depend on data.fit: train on the "
                                  "jsonl itself")

    def tasks(self) -> list[ShardTask]:
        """Returns the shards to write, in any order and on any machine, with `write_shard`."""
        return [ShardTask(source, self.directory, self.name, index, self.shards, self.stored)
                for source in self.sources for index in range(self.shards)]

    def finish(self) -> dict[str, Any]:
        """Writes the manifest and TFDS's metadata after all shards are written, and returns the manifest.

        Raises:
          SkippedTooMany: more than `max_skipped_share` of the records were rejected; the manifest names them.
        """
        parts = [(task, part) for task in self.tasks() if (part := _read_part(task))]
        if lost := [str(task.part) for task in self.tasks() if task not in [written for written, _ in parts]]:
            raise InputError(f"{lost[0]}: is missing or damaged, as are {len(lost) - 1} others; run the same command "
                             "again, which writes these shards again")
        rejected = [{"split": task.source.split, **record} for task, part in parts for record in part["rejected"]]
        reasons: dict[str, int] = {}
        for record in rejected:
            reasons[record["reason"]] = reasons.get(record["reason"], 0) + 1
        records = sum(part["records"] for _, part in parts)
        manifest = {
            "records": records, "rejected_by_reason": dict(sorted(reasons.items())),
            "video_frames": dataclasses.asdict(self.stored),
            "shards": {task.shard.name: {k: part[k] for k in ("records", "bytes", "sha256")} for task, part in parts},
            "rejected": rejected,
        }
        for folder in (Path(self.directory), Path(self.directory) / "shards"):
            remove_abandoned(folder)
        write_atomically(Path(self.directory) / "manifest.json", json.dumps(manifest, indent=1))
        if len(rejected) > self.max_skipped_share * (records + len(rejected)):
            raise SkippedTooMany(f"{len(rejected)} of {records + len(rejected)} records were rejected ({reasons}), "
                                 f"more than --max_skipped_share {self.max_skipped_share:g} allows: manifest.json "
                                 "names them; repair their files and run the same command again, or raise the limit")
        self._write_metadata(parts)
        write_sums(self.directory, ["dataset_info.json", "features.json", "manifest.json"])
        return manifest

    def _write_metadata(self, parts: Sequence[tuple[ShardTask, dict[str, Any]]]) -> None:
        import tensorflow_datasets as tfds

        splits = []
        for source in self.sources:
            own = [part for task, part in parts if task.source == source]
            template = tfds.core.ShardedFileTemplate(
                data_dir=self.directory, dataset_name=self.name, split=source.split, filetype_suffix="array_record")
            splits.append(tfds.core.SplitInfo(
                name=source.split, shard_lengths=[part["records"] for part in own],
                num_bytes=sum(part["bytes"] for part in own), filename_template=template))
        tfds.folder_dataset.write_metadata(
            data_dir=self.directory, features=features(), split_infos=splits, check_data=False,
            description="Written by vocojax: launch/prepare_data.py")


def write_shard(task: ShardTask) -> int:
    """Writes a shard, unless it was already written from the same input, and returns the number of its records.

    Records that can't be used are left out; the shard's JSON names them.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    inputs = _inputs(task)
    if before := _read_part(task):
        same = before["inputs"] == inputs and not before["bad_files"]
        if same and task.shard.is_file() and _sha256(task.shard) == before["sha256"]:
            return before["records"]
    source = _source(task.source, json.dumps(inputs))
    task.part.parent.mkdir(parents=True, exist_ok=True)
    rejected, records, bad_files = [], 0, 0
    with new_file(task.shard) as partial:
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        try:
            for index in range(task.index, len(source), task.count):
                try:
                    writer.write(_example(source, index, task.stored))
                    records += 1
                except (LayoutError, ImageError) as error:
                    bad_files += isinstance(error, ImageError)
                    rejected.append({"record": index, "reason": error.reason, "message": str(error)})
        finally:
            writer.close()
        part = {"records": records, "bytes": partial.stat().st_size, "sha256": _sha256(partial), "inputs": inputs,
                "bad_files": bad_files, "rejected": rejected}
        task.info.unlink(missing_ok=True)  # it holds the length of the shard that is replaced now
    write_atomically(task.part, json.dumps({**part, "checksum": _checksum(part)}))
    return records


def _read_part(task: ShardTask) -> dict[str, Any] | None:
    """Reads the counts of a shard; None if there are none, or they are damaged or of an earlier version."""
    try:
        part = parse_json(task.part.read_bytes())
        return part if part.pop("checksum") == _checksum(part) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _checksum(part: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()


def _example(source: Source, index: int, stored: StoredFrames) -> bytes:
    sample = source[index]
    images = []
    for image in sample.images:
        content, name = (image, sample.id) if isinstance(image, bytes) else (read(image), str(image))
        decode(content, name)
        images.append(content)
    videos = [_frames(video, stored) for video in sample.videos]
    record = {"id": sample.id, "images": images, "threads": json.dumps(sample.threads),
              "frames": [frame for frames in videos for frame in frames],
              "videos": json.dumps([len(frames) for frames in videos])}
    example = _serializer().get_tf_example(features().encode_example(record))
    return example.SerializeToString(deterministic=True)  # otherwise the order of fields depends on the process


def _frames(video: FrameSource, stored: StoredFrames) -> list[bytes]:
    """Returns the encoded frames of a video that are stored."""
    plan, contents = plan_frames(video, stored.sampling, stored.frames), []
    if isinstance(plan.video, tuple):
        for frame in plan.video:
            content = frame if isinstance(frame, bytes) else read(frame)
            decode(content, str(frame))
            contents.append(content)
        return contents
    for image in read_plan(plan):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=stored.jpeg_quality)
        contents.append(buffer.getvalue())
    return contents


@functools.cache
def _serializer() -> Any:
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    return ExampleSerializer(features().get_serialized_info())


@functools.lru_cache(maxsize=4)
def _source(part: PartConfig, inputs: str) -> Source:
    """Opens a source once for all shards of a process, and again when its `inputs` (of `_inputs`) change."""
    return open_source(DataConfig(source=part.source, split=part.split, path=part.path, image_root=part.image_root,
                                  threads_per_sample=part.threads_per_sample))


def _inputs(task: ShardTask) -> dict[str, Any]:
    """Returns what a shard is made from: if any of it changes, the shard is written again."""
    path = Path(task.source.path)
    content = _content(path, os.stat(path).st_mtime_ns, os.stat(path).st_ctime_ns) if path.is_file() else None
    return {**dataclasses.asdict(task.source), **dataclasses.asdict(task.stored), "version": VERSION,
            "file": content}


@functools.lru_cache(maxsize=16)
def _content(path: Path, *times: int) -> str:
    """Returns the digest of a file, once for all shards as long as it is not written."""
    return file_digest(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


