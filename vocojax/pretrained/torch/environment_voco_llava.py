"""The versions of transformers that these sources are tested with, and what they name differently.

Importing this module checks the version, so it is imported before anything that another version may lack.
"""

import re

import transformers
from transformers.utils import logging

LOWEST, HIGHEST = (4, 53), (5, 24)  # major and minor number


def check_version(version: str) -> tuple[int, int]:
    """Returns the major and the minor number of a version of transformers; logs a warning if it is newer than tested.

    Raises:
      ImportError: it is older than the lowest that was tested. Those lack what the sources need.
    """
    major, minor = map(int, re.findall(r"\d+", version)[:2])
    (low, lowest), (high, highest) = LOWEST, HIGHEST
    tested = f"this model's code is tested with transformers {low}.{lowest} to {high}.{highest}"
    remedy = f"pip install 'transformers>={low}.{lowest},<{high}.{highest + 1}'"
    if (major, minor) < LOWEST:
        raise ImportError(f"{tested}, and can't run with {version}, which is older: {remedy}")
    if (major, minor) > HIGHEST:
        logging.get_logger("transformers").warning_once(f"{tested}; {version} is newer. If it fails: {remedy}")
    return major, minor


# Name of the keys and values of earlier tokens, as an argument and in outputs.
PAST = "cache" if check_version(transformers.__version__) >= (5, 24) else "past_key_values"
