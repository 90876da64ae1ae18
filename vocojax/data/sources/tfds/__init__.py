"""Data sets as TFDS directories of array_record shards: written here, and read without TensorFlow."""

from vocojax.data.sources.tfds.reader import TfdsSource
from vocojax.data.sources.tfds.shards import Preparation, ShardTask, StoredFrames, write_shard

__all__ = ["Preparation", "ShardTask", "StoredFrames", "TfdsSource", "write_shard"]
