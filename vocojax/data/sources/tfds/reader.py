"""Reads a data set that `shards.py` wrote: random access without TensorFlow, by TFDS's `as_data_source`."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vocojax.data.conversation import Turn
from vocojax.data.sources.base import Sample
from vocojax.data.sources.tfds.features import require_own_features
from vocojax.errors import InputError, MissingPackage, first_line
from vocojax.sums import require_small_files


class TfdsSource:
    """A split of a prepared data set.

    Args:
      directory: holds `dataset_info.json`, which is written when all shards are complete.
      split: name of the split.

    Raises:
      InputError: the directory holds no complete data set, or the data set has no such split.
      MissingPackage: the extra `tfds` is not installed.
    """

    def __init__(self, directory: str | Path, split: str):
        self._directory, self._split = Path(directory), split
        self._open()

    def _open(self) -> None:
        try:
            import tensorflow_datasets as tfds  # takes seconds
        except ImportError as error:
            raise MissingPackage(f"source 'tfds' needs pip install -e '.[tfds]': {error}") from error
        if not (self._directory / "dataset_info.json").exists():
            raise InputError(f"{self._directory} holds no complete data set: launch/prepare_data.py writes one")
        require_small_files(self._directory)
        require_own_features(self._directory)
        try:
            builder = tfds.builder_from_directory(str(self._directory))
        except Exception as error:  # TFDS raises many types for damaged metadata
            raise InputError(f"{self._directory}/dataset_info.json: can't be read: {first_line(error)}; run "
                             "launch/prepare_data.py again") from error
        if self._split not in builder.info.splits:
            raise InputError(f"{self._directory} has the splits {sorted(builder.info.splits)}, not {self._split!r}")
        try:
            self._records = builder.as_data_source(self._split)
        except Exception as error:
            raise self._damage(error) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"_directory": self._directory, "_split": self._split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._records)

    def _damage(self, error: Exception) -> InputError:
        return InputError(f"{self._directory}: split {self._split!r} is damaged: {first_line(error)}; run "
                          "launch/prepare_data.py again, which writes damaged shards again")

    def __getitem__(self, index: int) -> Sample:
        """Reads a sample.

        Raises:
          InputError: its shard is damaged.
        """
        try:
            return self._sample(self._records[index])
        except IndexError:
            raise
        except Exception as error:  # of the checksums in the shards, and of everything that reads them
            raise self._damage(error) from error

    @staticmethod
    def _sample(record: Mapping[str, Any]) -> Sample:
        threads = tuple(tuple(Turn(*turn) for turn in thread) for thread in json.loads(record["threads"]))
        frames = iter(record.get("frames", ()))  # absent in data sets of version 0.1
        videos = tuple(tuple(itertools.islice(frames, count)) for count in json.loads(record.get("videos", "[]")))
        return Sample(record["id"].decode(), tuple(record["images"]), threads, videos)
