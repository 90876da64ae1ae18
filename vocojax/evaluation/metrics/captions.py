"""CIDEr of captions, by the official package `pycocoevalcap`, whose tokenizer is a Java program."""

import importlib
import shutil
from collections.abc import Mapping, Sequence

from vocojax.errors import InputError, MissingPackage


def cider(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> tuple[float, dict[str, float]]:
    """Returns CIDEr, overall and of each caption, after PTB tokenization.

    Document frequencies come from the references given, so that scores of different sets do not compare.

    Args:
      captions: one per id.
      references: all of an id's; the same ids.

    Raises:
      MissingPackage: `pycocoevalcap` is not installed.
      InputError: there is no Java.
    """
    if shutil.which("java") is None:
        raise InputError("CIDEr's official tokenizer needs Java, and there is no `java` on the PATH: install a Java "
                         "runtime (for example, apt install default-jre-headless)")
    try:
        tokenizer = importlib.import_module("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
        scorer = importlib.import_module("pycocoevalcap.cider.cider").Cider()
    except ImportError as error:
        raise MissingPackage("CIDEr needs the package pycocoevalcap: pip install -e '.[benchmarks]'") from error
    ids = list(references)
    gold = tokenizer.tokenize({key: [{"caption": _line(each)} for each in references[key]] for key in ids})
    said = tokenizer.tokenize({key: [{"caption": _line(captions[key])}] for key in ids})
    overall, each = scorer.compute_score(gold, said)
    return float(overall), dict(zip(ids, map(float, each), strict=True))


def _line(text: str) -> str:
    """Returns a text in one line: the tokenizer takes one caption per line."""
    return text.replace("\n", " ")
