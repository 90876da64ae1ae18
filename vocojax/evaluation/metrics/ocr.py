"""OCRBench: whether a gold answer is contained in the answer."""

from collections.abc import Sequence

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: ord(" ")}


def contains_gold(text: str, golds: str | Sequence[str], dataset: str) -> bool:
    """Returns whether one of the gold answers is contained in an answer.

    Args:
      text: the answer.
      golds: one gold answer or several.
      dataset: the source of the question; formulas (`HME100k`) are compared with their case and without spaces.
    """
    clean = _formula if dataset == "HME100k" else _words
    return any(clean(gold) in clean(text) for gold in ([golds] if isinstance(golds, str) else golds))


def contains_gold_lmms_eval(text: str, golds: str | Sequence[str], dataset: str) -> bool:
    """Returns lmms-eval's mark: full-width characters are the ASCII ones, except in formulas."""
    if dataset != "HME100k":
        golds = [gold.translate(_FULL_WIDTH) for gold in ([golds] if isinstance(golds, str) else golds)]
        text = text.strip().translate(_FULL_WIDTH)
    return contains_gold(text, golds, dataset)


def _words(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
