"""Writes a source as a TFDS data set of array_record shards, in as many processes or machines as Beam is given.

    python launch/prepare_data.py --source=llava --path=llava_v1_5_mix665k.json --image_root=images \
        --target=data/mix665k --shards=256 -- \
        --runner=FnApiRunner --direct_running_mode=multi_processing --direct_num_workers=8
    python launch/prepare_data.py --source=easy_vqa --splits=train,validation,test --target=data/easy_vqa --shards=4

Flags behind `--` are Beam's own (Dataflow, Flink and Spark run it as well); the target is a directory that all workers
share. The same command goes on after a crash, and tries records again whose images were missing or damaged.
Training reads it by --config.data.source=tfds --config.data.path=data/mix665k.
"""

import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vocojax.cli.terminal import show_own_messages
from vocojax.config import ConfigError, build
from vocojax.data.config import PartConfig
from vocojax.data.loader import SkippedTooMany
from vocojax.data.sources.tfds import Preparation, write_shard

SOURCE = flags.DEFINE_string("source", "llava", "As data.source of a stage's config.")
SPLITS = flags.DEFINE_list("splits", ["train"], "Splits to write; other sources than easy_vqa have one.")
PATH = flags.DEFINE_string("path", "", "The source's file.")
IMAGE_ROOT = flags.DEFINE_string("image_root", "", "Directory of its images.")
TARGET = flags.DEFINE_string("target", None, "Directory of the data set.", required=True)
NAME = flags.DEFINE_string("name", "vocojax_data", "Name of the data set.")
SHARDS = flags.DEFINE_integer("shards", 16, "Files per split.")
MAX_SKIPPED_SHARE = flags.DEFINE_float("max_skipped_share", 0.01, "Share of records that may be rejected.")


def main(beam_arguments: list[str]) -> None:
    if beam_arguments[1:] and sys.argv[-len(beam_arguments)] != "--":
        raise app.UsageError(f"unexpected arguments (Beam's go behind `--`): {beam_arguments[1:]}")
    show_own_messages()
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        sys.exit("error: Apache Beam is not installed: pip install 'vocojax[beam]', in an environment of its own")
    try:
        sources = tuple(build(PartConfig, {"source": SOURCE.value, "split": split, "path": PATH.value,
                                           "image_root": IMAGE_ROOT.value}) for split in SPLITS.value)
        preparation = Preparation(sources, TARGET.value, NAME.value, SHARDS.value, MAX_SKIPPED_SHARE.value)
        with beam.Pipeline(options=PipelineOptions(beam_arguments[1:])) as pipeline:
            _ = pipeline | beam.Create(preparation.tasks()) | beam.Reshuffle() | beam.Map(write_shard)
        manifest = preparation.finish()
    except (ConfigError, SkippedTooMany, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{manifest['records']} records in {len(manifest['shards'])} shards, {len(manifest['rejected'])} rejected")
    for reason, count in manifest["rejected_by_reason"].items():
        print(f"  {count:8} {reason}")
    print(Path(TARGET.value) / "manifest.json")


if __name__ == "__main__":
    app.run(main)
