"""Lines of JSON that any terminal or file can hold."""

import json
from typing import Any


def json_line(value: Any, encoding: str | None) -> str:
    """Returns a value as one line of JSON that can be written in an encoding.

    Args:
      value: anything that JSON can hold.
      encoding: of what it is written to; None for UTF-8. Characters that it lacks, and lone surrogates, which no
        encoding has, make the whole line ASCII with JSON's escapes.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
