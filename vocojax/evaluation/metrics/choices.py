"""The letter of an option that an answer chooses, as each benchmark's script reads it; None where it reads none."""

import re
from collections.abc import Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REFUSED = "Z"  # VLMEvalKit's letter for an answer that refuses

_REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
             "I'm sorry, but without the image provided", "Cannot determine the answer")
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_SCIENCE_QA_ANSWER = re.compile(r"The answer is ([A-Z]).")


def mmbench_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Returns VLMEvalKit's reading without a judge model (its policy `exact_matching`).

    Args:
      text: the answer.
      options: texts of the options by their letters.

    Returns:
      A letter, "Z" for a refusal, or None.
    """
    return _letter_among_words(text, options) or _option_text_within(text, options)


def _letter_among_words(text: str, options: Mapping[str, str]) -> str | None:
    if "Failed to obtain answer via API" in text:
        return None
    if any(refusal in text for refusal in _REFUSALS):
        return REFUSED
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return found[0]
    if not found and REFUSED in words:
        return REFUSED
    said = _ANSWER_IS.search(text)
    return said.group(1).upper() if said and said.group(1).upper() in options else None


def _option_text_within(text: str, options: Mapping[str, str]) -> str | None:
    text = text.lower()
    if len(text) > 2 * sum(len(option) for option in options.values()):
        return None
    found = [letter for letter, option in options.items() if option.lower() in text]
    return found[0] if len(found) == 1 else None


def science_qa_letter(text: str) -> str | None:
    """Returns LLaVA's reading of an answer to ScienceQA."""
    if text in tuple("ABCDE"):
        return text
    if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return text[0]
    found = _SCIENCE_QA_ANSWER.findall(text)
    return found[0] if len(found) == 1 else None


def science_qa_letter_lmms_eval(text: str) -> str | None:
    """Returns lmms-eval's reading of an answer to ScienceQA."""
    text = text.strip()
    if len(text) >= 2 and text[0].isupper() and text[1] == ".":
        return text[0]
    return text.upper() if len(text) == 1 else None


def first_letter(text: str) -> str | None:
    """Returns the first character in upper case, as lmms-eval reads answers to SEED-Bench."""
    return text.strip()[:1].upper() or None


def video_mme_letter(text: str) -> str | None:
    """Returns the official Video-MME script's reading: the first letter A to D after four phrases are removed.

    The script means to remove four more ("Best answer:" among them), but commas are missing in its list: an answer
    "Best answer: C" reads as B.
    """
    text = text.strip()
    for phrase in ("The best answer is", "The correct answer is", "The answer is", "The answer"):
        text = text.replace(phrase, "")
    found = re.search(r"[ABCD]", text)
    return found.group() if found else None


def option_letter(text: str, options: Sequence[str]) -> str | None:
    """Returns the letter that an answer states or whose option it is, in one simple rule.

    For benchmarks that publish no reader of generated answers. The letter counts at the start ("B", "(B) ...",
    "B. ...", "B: ..."), after "answer is" or "option", or where the whole text is an option's, in any case.

    Args:
      text: the answer.
      options: their texts, in the order of the letters.
    """
    letters = LETTERS[: len(options)]
    text = text.strip()
    stated = re.match(rf"\(?([{letters}])(?:[).:,\s]|$)", text) or re.search(
        rf"(?:answer is|option)\s*:?\s*\(?([{letters}])\b", text)
    if stated:
        return stated.group(1)
    plain = lambda words: words.strip().rstrip(".").lower()
    same = [letter for letter, option in zip(letters, options, strict=True) if plain(option) == plain(text)]
    return same[0] if len(same) == 1 else None
