"""Writes a source of images or videos as a TFDS data set of array_record shards, with Beam.

    vocojax prepare_data --source=llava --path=llava_v1_5_mix665k.json --image_root=images \\
        --target=data/mix665k --shards=256 -- \\
        --runner=FnApiRunner --direct_running_mode=multi_processing --direct_num_workers=8
    vocojax prepare_data --source=webvid --path=results_2M_train.csv --image_root=videos --target=data/webvid \\
        --frames=16 --frame_sampling=uniform --jpeg_quality=90
    vocojax prepare_data --source=easy_vqa --splits=train,validation,test --target=data/easy_vqa --shards=4

Flags after `--` are Beam's own (Dataflow, Flink and Spark work too); the target is a directory that all workers share.
Run the same command after a crash: it resumes, and tries records again whose images were missing or damaged.
Videos are decoded once, to the frames that the flags name (recorded in manifest.json); a stage with fewer `data.frames`
takes some of these. Training reads the data set with --config.data.source=tfds --config.data.path=data/mix665k.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from vocojax.errors import MissingPackage

FLAGS = flags.FLAGS
HANDS_ARGUMENTS_ON = True  # to Beam


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("source", "llava", "As data.source of a stage's config.")
    flags.DEFINE_list("splits", ["train"], "Splits to write; sources other than easy_vqa have one.")
    flags.DEFINE_string("path", "", "File of the source.")
    flags.DEFINE_string("image_root", "", "Directory of its images or videos.")
    flags.DEFINE_string("target", None, "Directory of the data set.", required=True)
    flags.DEFINE_string("name", "vocojax_data", "Name of the data set.")
    flags.DEFINE_integer("shards", 16, "Files per split.")
    flags.DEFINE_integer("frames", 8, "The most frames of a video that are stored.")
    flags.DEFINE_enum("frame_sampling", "uniform", ["uniform", "segments", "fps"], "Which frames of a video.")
    flags.DEFINE_integer("jpeg_quality", 95, "Quality of the stored frames of video files, from 1 to 100.")
    flags.DEFINE_float("max_skipped_share", 0.01, "Share of records that may be rejected.")


def main(arguments: Sequence[str]) -> None:
    """Writes the data set; the arguments after `--` are Beam's."""
    if arguments and arguments[0] != "--":
        raise app.UsageError(f"unexpected arguments (Beam's come after `--`): {' '.join(arguments)}")
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise MissingPackage("Apache Beam is not installed: pip install -e '.[beam]', in an environment of its "
                             "own") from error
    from vocojax.config import build
    from vocojax.data.config import PartConfig
    from vocojax.data.sources.tfds import Preparation, StoredFrames, write_shard

    part = {"source": FLAGS.source, "path": FLAGS.path, "image_root": FLAGS.image_root}
    sources = tuple(build(PartConfig, {**part, "split": split}) for split in FLAGS.splits)
    stored = StoredFrames(FLAGS.frames, FLAGS.frame_sampling, FLAGS.jpeg_quality)
    preparation = Preparation(sources, FLAGS.target, FLAGS.name, FLAGS.shards, FLAGS.max_skipped_share, stored)
    with beam.Pipeline(options=PipelineOptions(list(arguments[1:]))) as pipeline:
        _ = pipeline | beam.Create(preparation.tasks()) | beam.Reshuffle() | beam.Map(write_shard)
    manifest = preparation.finish()
    print(f"{manifest['records']} records in {len(manifest['shards'])} shards, {len(manifest['rejected'])} rejected")
    for reason, count in manifest["rejected_by_reason"].items():
        print(f"  {count:8} {reason}")
    print(Path(FLAGS.target) / "manifest.json")
