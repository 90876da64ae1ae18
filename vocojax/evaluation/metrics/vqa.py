"""Soft accuracy against ten annotators: VQAv2, TextVQA and VizWiz, each with its own cleaning of answers.

The three official scripts share one formula and differ in what they clean: VQAv2 cleans both sides, and only where the
annotators disagree; TextVQA (M4C, LLaVA) always cleans both sides; VizWiz always cleans the prediction and never the
annotators' answers. lmms-eval always cleans both sides.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
PERIODS_REMOVED = 32  # the official call passes the flag re.UNICODE, which is 32, as the largest count
NUMBERS = {word: str(number) for number, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))} | {"none": "0"}
ARTICLES = {"a", "an", "the"}

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_COMMAS_IN_NUMBER = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")

# A contraction is restored where exactly one of its apostrophes is missing.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't "
    "he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've "
    "mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't "
    "shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's "
    "something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've "
    "they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't "
    "wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've "
)
# Of VizWiz's table, which has curly apostrophes but for these.
_STRAIGHT_IN_VIZWIZ = {"ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"}


def _missing_one(contraction: str) -> list[str]:
    """Returns a contraction with each one of its apostrophes missing."""
    return [contraction[:i] + contraction[i + 1 :] for i, letter in enumerate(contraction) if letter in "'’"]


def _contractions() -> dict[str, str]:
    table = {short: full for full in _CONTRACTIONS.split() for short in _missing_one(full)}
    return table | {"somebody'd": "somebodyd"}


def _vizwiz_contractions() -> dict[str, str]:
    curly = lambda text: text.replace("'", "’")
    forms = [text if text in _STRAIGHT_IN_VIZWIZ else curly(text) for text in _CONTRACTIONS.split()]
    table = {short: full for full in forms for short in _missing_one(full)}
    table |= {"somebody’d": "somebodyd", "couldn'tve": "couldn’t’ve", "hadn'tve": "hadn’t’ve"}
    return {short: full for short, full in table.items() if short not in ("couldn’tve", "hadn’tve")}


VQA_CONTRACTIONS: Mapping[str, str] = _contractions()
VIZWIZ_CONTRACTIONS: Mapping[str, str] = _vizwiz_contractions()


def without_punctuation(text: str, comma_in_number: re.Pattern[str] = _COMMA_IN_NUMBER) -> str:
    """Returns a text with its punctuation deleted or replaced by spaces.

    A mark is deleted if it touches a space anywhere in the text, or if the text has a comma between digits; otherwise
    it becomes a space. Then periods go, except those before a digit.
    """
    has_number = comma_in_number.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        touches_space = mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if touches_space or has_number else " ")
    return _PERIOD.sub("", cleaned, count=PERIODS_REMOVED)


def plain_words(text: str, contractions: Mapping[str, str] = VQA_CONTRACTIONS) -> str:
    """Returns a text in lower case with number words as digits, without articles, with contractions restored."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


def one_line(text: str) -> str:
    """Returns a text with newlines and tabs as spaces, stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def textvqa_answer(text: str) -> str:
    """Returns an answer as TextVQA's evaluator (M4C, LLaVA) compares it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(without_punctuation(one_line(text), _COMMAS_IN_NUMBER))


def vqa_answer(text: str) -> str:
    """Returns an answer as VQAv2's evaluator compares it, where its annotators disagree."""
    return plain_words(without_punctuation(one_line(text)))


def vizwiz_answer(text: str) -> str:
    """Returns a prediction as VizWiz's evaluator compares it with the annotators' raw answers."""
    return plain_words(without_punctuation(one_line(text)), VIZWIZ_CONTRACTIONS)


def soft_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Returns the mean over the annotators of min(1, matches among the others / 3); both sides are clean."""
    matches = [annotator == answer for annotator in annotators]
    others = [sum(matches) - own for own in matches]
    return float(sum(min(1, float(count) / 3) for count in others)) / len(others)


Annotator = str | Mapping[str, Any]  # an answer, or the annotation's record of it


def vqa_accuracy(answer: str, annotators: Sequence[Annotator]) -> float:
    """Returns VQAv2's accuracy of one answer.

    Args:
      answer: as generated.
      annotators: their answers, or the annotation's records of them. The official script tells annotators apart by
        their records, so that two records that are equal in all fields are left out together.
    """
    records = _records(annotators)
    answer = one_line(answer)
    if len({record["answer"] for record in records}) > 1:
        answer = vqa_answer(answer)
        for record in records:
            record["answer"] = vqa_answer(record["answer"])
    return float(sum(marks := _marks(answer, records))) / len(marks)


def vqa_accuracy_lmms_eval(answer: str, annotators: Sequence[Annotator]) -> float:
    """Returns lmms-eval's accuracy of one answer to VQAv2: both sides are always cleaned."""
    clean = lambda text: plain_words(without_punctuation(one_line(text), _COMMAS_IN_NUMBER))
    records = [{**record, "answer": clean(record["answer"])} for record in _records(annotators)]
    return float(statistics.mean(_marks(clean(answer), records)))


def _records(annotators: Sequence[Annotator]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [dict(each) if isinstance(each, Mapping) else {"answer": each, "answer_id": number}
                                     for number, each in enumerate(annotators)]
    for record in records:
        record["answer"] = one_line(record["answer"])
    return records


def _marks(answer: str, records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Returns min(1, matches / 3) among the others, for each annotator that is left out."""
    matching = [record for record in records if record["answer"] == answer]
    return [min(1, float(sum(other != own for other in matching)) / 3) for own in records]


def textvqa_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Returns TextVQA's accuracy of one answer."""
    return soft_accuracy(textvqa_answer(answer), [textvqa_answer(each) for each in annotators])


def vizwiz_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Returns VizWiz's accuracy of one answer."""
    return soft_accuracy(vizwiz_answer(answer), annotators)
