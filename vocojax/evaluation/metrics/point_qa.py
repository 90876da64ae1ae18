"""PointQA: the answer after "The answer is", up to the first period."""

import re

_ANSWER = re.compile(r"The answer is (.+?)\.")


def point_qa_answer(text: str) -> str | None:
    """Returns the answer that a text states exactly once; None otherwise.

    It ends at the first period, so an answer with decimals is cut.
    """
    found = _ANSWER.findall(text.strip())
    return found[0].strip() if len(found) == 1 else None
