"""The features of a prepared data set's records: those that are written, and those that are read."""

import functools
from pathlib import Path
from typing import Any

from vocojax.errors import InputError
from vocojax.files import parse_json


@functools.cache
def features(names: tuple[str, ...] = ("id", "images", "threads", "frames", "videos")) -> Any:
    """Returns TFDS's description of a record.

    Args:
      names: its entries. `images` and `frames` are lists of encoded images, the others are text.
    """
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    several = tfds.features.Sequence(text)
    return tfds.features.FeaturesDict({name: several if name in ("images", "frames") else text for name in names})


def require_own_features(directory: Path) -> None:
    """Refuses a features.json that this project does not write: TFDS would import any module that it names.

    Raises:
      InputError: it is another one, missing or damaged.
    """
    path = directory / "features.json"
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read: {error}; run launch/prepare_data.py again") from None
    from google.protobuf import json_format

    of_version_0_1 = features(("id", "images", "threads"))
    if found not in [json_format.MessageToDict(own.to_proto()) for own in (features(), of_version_0_1)]:
        raise InputError(f"{path}: is not what launch/prepare_data.py writes; run it again, with a new --target if "
                         "another program wrote this data set")
